"""The whole comparison, on a checkpoint of less than a MiB and real processes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emoe.bench.client import WorkerClient, WorkerError
from emoe.bench.cores import usable_cores
from emoe.bench.feeding import feed
from emoe.bench.peers import comparing
from emoe.bench.peers.build import VERSION, build_command, build_llama, cache_folder, llama_python, worker_command
from emoe.bench.peers.comparing import compare
from emoe.bench.peers.entries import PeersSettings
from emoe.bench.peers.gguf_file import write_gguf
from emoe.bench.peers.results import PeersReport
from emoe.bench.peers.routes import planted_routes
from emoe.bench.plant.shapes import PUBLISHED
from emoe.bench.plant.write import plant
from emoe.config import ExpertMemory
from emoe.errors import BudgetError, UsageError
from emoe.profiling.machine import Machine
from tests.bench.peers.checkpoints import FAMILIES, VOCABULARY, save
from tests.bench.plant.made_up import made_up_trace

CACHE = cache_folder(os.environ.get("EMOE_PEERS_CACHE"))
WITH_LLAMA = pytest.mark.skipif(
    llama_python(CACHE) is None or importlib.util.find_spec("gguf") is None,
    reason="needs gguf, and llama.cpp: emoe bench peers --build-llama-cpp (EMOE_PEERS_CACHE names another cache)",
)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def settings_of(folder: Path, cache: Path, **changes: object) -> PeersSettings:
    usual = {
        "memory_limits": ("none",),
        "prefill": 12,
        "decode": 4,
        "rounds": 1,
        "threads": (1,),
        "modes": ("exact",),
        "budgets": (ExpertMemory("share", 0.5),),
    }
    return PeersSettings(folder=folder, cache=cache, **(usual | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers") / "tiny"
    save("olmoe", folder)
    return folder


MACHINE = Machine({}, memory_bytes_per_s={1: 1e9}, disk_direct_bytes_per_s=1e8, disk_cached_bytes_per_s=1e9,
                  flops={"float32": {1: 1e10}})  # fmt: skip


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "machine_of", lambda *_: MACHINE)


@pytest.fixture(scope="module")
def report(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> PeersReport:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "machine_of", lambda *_: MACHINE)
        made = compare(settings_of(tiny, cache, cores=usable_cores()))
    assert not list(cache.glob("offload-*"))  # what accelerate wrote is gone
    return made


@pytest.mark.slow
@LINUX
def test_every_engine_that_is_here_is_measured(report: PeersReport) -> None:
    rows = {row.entry.peer: row for row in report.rows}
    assert list(rows) == ["emoe", "transformers", "accelerate", "airllm", "llama.cpp"]
    for peer in ("emoe", "transformers", "accelerate"):
        assert rows[peer].error is None
        found = rows[peer].samples[0]
        assert len(found["step_s"]) == len(found["log_probabilities"]) == 4
        assert found["first_token_s"] > 0
    assert (
        rows["llama.cpp"].error == f"not installed: emoe bench peers --build-llama-cpp --cache {report.settings.cache}"
    )
    if importlib.util.find_spec("airllm") is None:
        assert rows["airllm"].error == "not installed: pip install airllm"
    assert not report.failed
    for peer in ("emoe", "transformers", "accelerate"):
        assert rows[peer].entry.cores == usable_cores()[:1]
        assert rows[peer].loads[0]["cores"] == list(usable_cores()[:1])  # as the process itself says
        assert rows[peer].limits.keys() == {"decode", "prefill"}
        assert rows[peer].samples[0]["first_prompt_s"] != rows[peer].samples[0]["first_token_s"]
    assert json.loads(json.dumps(report.as_dict()))["rows"][0]["decoded_tokens"] == 4


@pytest.mark.slow
@LINUX
def test_all_are_fed_the_same(report: PeersReport) -> None:
    """In float32 the engines agree on every given token: another token, or another route, would not."""
    measured = [row for row in report.rows if row.samples]
    assert len(measured) >= 3
    for row in measured:
        difference = report.disagreement(row)
        assert difference is not None
        assert difference < 1e-3


@pytest.mark.slow
@LINUX
def test_an_engine_that_takes_too_long_is_ended(tiny: Path) -> None:
    with (
        WorkerClient("sleeper", command=(sys.executable, "-c", "import time; time.sleep(60)")) as client,
        pytest.raises(WorkerError, match=r"sleeper took more than 0\.3 s to load and was ended"),
    ):
        client.ask("load", within_s=0.3)


def test_a_limit_too_small_for_emoe_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"memory limit of 1\.00 MiB is less than .* needs; give at least"):
        compare(settings_of(tiny, tmp_path, memory_limits=("1MiB",), budgets=()))


@LINUX
def test_feeding_stops_when_its_time_is_over() -> None:
    def passes() -> object:
        while True:
            yield 7

    found = feed(iter(passes()), range(100), lambda known, token: float(known - token), seconds=0.0)  # type: ignore[call-overload]
    assert found.log_probabilities == [7.0, 6.0]
    assert len(found.step_s) == 1
    everything = feed(iter(passes()), range(5), lambda known, token: float(known - token), seconds=60.0)  # type: ignore[call-overload]
    assert len(everything.step_s) == len(everything.log_probabilities) == 5


def test_building_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UsageError, match=r"no C\+\+ compiler"):
        build_llama(tmp_path)
    assert llama_python(tmp_path) is None
    assert build_command(tmp_path)[-1] == f"llama-cpp-python=={VERSION}"
    assert not list(tmp_path.iterdir())


def built() -> Path:
    python = llama_python(CACHE)
    assert python is not None
    return python


@WITH_LLAMA
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    """The same log-probabilities as transformers in float32: so the same routes, too."""
    model = save(family, tmp_path / "model")
    file = write_gguf(tmp_path / "model", tmp_path / "x.gguf")
    ids = torch.randint(VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits[0].double().log_softmax(-1)
    command, source = worker_command(built())
    with WorkerClient("llama.cpp", threads=1, command=command, environment=source) as client:
        loaded = client.ask("load", gguf=str(file), threads=1, load_mode="mmap", repack=False, context=64)
        assert loaded["threads"] == 1
        tokens = ids[0].tolist()
        found = client.ask("feed", prompt=tokens[:20], forced=tokens[20:], seconds=60)["log_probabilities"]
        with pytest.raises(WorkerError, match=f"token {VOCABULARY} is not one of the model's {VOCABULARY}"):
            client.ask("feed", prompt=[VOCABULARY], forced=[1], seconds=60)
    # llama.cpp keeps keys and values in float16, and rounds the corners of gpt-oss's YaRN to whole dimensions.
    tolerance = 0.05 if family == "gpt_oss" else 0.01
    for number, token in enumerate(tokens[20:]):
        assert math.isclose(found[number], float(wanted[19 + number, token]), abs_tol=tolerance)


@WITH_LLAMA
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["native", "q8_0", "q4_0"])
def test_llama_cpp_takes_the_planted_routes(family: str, precision: str, tmp_path: Path) -> None:
    trace = made_up_trace(40).write(tmp_path / "made-up.npz")
    shape = PUBLISHED[f"tiny-{family.replace('_', '-')}"]
    if family == "olmoe":
        shape = replace(shape, kv_heads=shape.heads)  # the only one that llama.cpp knows, and OLMoE's own
    plant(shape, trace, 40, tmp_path / "planted")
    file = write_gguf(tmp_path / "planted", tmp_path / "x.gguf", precision)
    found = planted_routes(tmp_path / "planted", file, built(), 40)
    assert found.equal == found.of == 40 * 3


@WITH_LLAMA
def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    command, source = worker_command(built())
    with (
        WorkerClient("llama.cpp", command=command, environment=source) as client,
        pytest.raises(WorkerError, match=r"llama\.cpp cannot load .*: .*(magic|gguf|read)"),
    ):
        client.ask("load", gguf=str(tmp_path / "x.gguf"), threads=1, load_mode="mmap", repack=False, context=64)
