"""`emoe info`: what a bug report needs to say of the machine and of what is installed."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import emoe
from emoe.checkpoint.memory_room import memory_room
from emoe.cli.options import add_command, add_json
from emoe.cli.output import print_json
from emoe.config import format_bytes, user_cache
from emoe.errors import UsageError
from emoe.profiling.kept import cores, processor

PACKAGES = (
    *("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "accelerate", "triton"),
    *("fastapi", "uvicorn", "prometheus_client", "psutil", "matplotlib"),
)
_VARIABLES = ("EMOE_", "OMP_", "MKL_", "HF_", "CUDA_", "PYTORCH_")
_SECRET = ("TOKEN", "KEY", "SECRET", "PASS", "AUTH", "CRED")
_USER = re.compile(r"//[^/@]*@")


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "info", run, "Versions, kernels, processor and memory: paste it into a bug report.")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print it. Whatever cannot be found out is said in its place."""
    found = facts()
    if args.json:
        print_json(found)
        return 0
    for name, value in found.items():
        print(f"{name.replace('_', ' ').removesuffix(' bytes'):<10}  {_shown(name, value)}")
    return 0


def facts() -> dict[str, Any]:
    """What is installed and what it runs on."""
    room = memory_room(with_own=True)
    return {
        "emoe": f"{emoe.__version__} in {Path(emoe.__file__).parent}",
        "python": f"{platform.python_version()} in {sys.prefix}",
        "system": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_bytes": room.available_bytes,
        "free_bound": room.bound,
        **_of_torch(),
        "cache": _cache(),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: _value(name) for name in sorted(os.environ) if name == "CC" or name.startswith(_VARIABLES)},
    }


def _of_torch() -> dict[str, Any]:
    """What only torch can tell. That it cannot be imported may be what the report is about."""
    try:
        import torch

        from emoe.kernels.choice import kernel_of
    except (ImportError, OSError) as error:
        return {"torch": f"cannot be imported: {error}"}
    try:
        kernel = kernel_of("cpu", torch.bfloat16)
        kernels = f"{kernel.name}: {kernel.reason}"
        if kernel.calls is not None:
            kernels += f"; for prompts {kernel.many_rows(torch.bfloat16)}"
    except UsageError as error:
        kernels = str(error)
    return {
        "threads": torch.get_num_threads(),
        "devices": _devices(torch),
        "kernels": kernels,
    }


def _devices(torch: Any) -> list[str]:
    """Their names; what CUDA says where it cannot give them."""
    try:
        return [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    except RuntimeError as error:
        return [f"CUDA fails: {error}"]


def _cache() -> str:
    folder = user_cache()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return f"{folder}{'' if os.access(there, os.W_OK) else ' (cannot be written)'}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _value(name: str) -> str:
    """Its value, unless it may be a secret."""
    return "(set)" if any(word in name.upper() for word in _SECRET) else _USER.sub("//...@", os.environ[name])


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {each or '-'}" for key, each in value.items()) or "none"
    return (", ".join(value) or "none") if isinstance(value, list) else str(value)
