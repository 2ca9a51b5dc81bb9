# Needs: python3.11 or newer, make, and a package registry that pip can reach. Everything else is made in .venv.
#
# torch is installed first and by itself, so that its build can be chosen. On a machine whose registry serves the CUDA build
# by default, TORCH_INDEX_URL names the index of the CPU builds; PIP_TORCH_ARGS passes anything else to that one command.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_INDEX_URL ?=
PIP_TORCH_ARGS ?= $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
ARGS ?=
GPU_PYTHON ?= python3

.PHONY: help demo test lint types bench bench-gpu clean
.DEFAULT_GOAL := help

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Run the embedded model with all experts and with 40 % of them
	env -u OMP_NUM_THREADS $(BIN)/emoe demo $(ARGS)

test: lint types ## Check style and types, then run the tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev ## Check style and formatting rules
	$(BIN)/python -m ruff check .

types: $(VENV)/.dev ## Check types strictly
	$(BIN)/python -m mypy

bench: $(VENV)/.dev ## Measure decode at several budgets beside transformers and accelerate
	env -u OMP_NUM_THREADS $(BIN)/emoe bench decode $(ARGS)

bench-gpu: ## Test and measure on a CUDA device, with the Python that has torch there (GPU_PYTHON); installs nothing
	PYTHONPATH=src:. $(GPU_PYTHON) bench/gpu.py $(ARGS)

clean: ## Remove everything the targets made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3.11 found; set PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is older than Python 3.11; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "installing into $(VENV): once, some minutes (torch is 200 MB as a CPU build, some GB with CUDA)"
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) install --quiet $(PIP_TORCH_ARGS) torch==$(TORCH_VERSION)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed
