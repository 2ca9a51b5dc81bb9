"""What is planned can be run: the sizes, the order, and what is made of the times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emoe import nano
from emoe.bench import decode
from emoe.bench.plant.shapes import PUBLISHED
from emoe.bench.plant.write import plant
from emoe.bench.reach import Reach
from emoe.bench.reach_run import Run, gains, measure, note, runs_of, to_run
from emoe.bench.results import Outcome
from emoe.bench.settings import Contender, DecodeSettings
from emoe.cli import main
from emoe.config import ExpertMemory
from emoe.errors import UsageError
from emoe.profiling.machine import Machine
from tests.bench.plant.made_up import made_up_trace

TOKENS = 60
MEMORY = ExpertMemory("share", 0.6)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    plant(PUBLISHED["tiny-gpt-oss"], made_up_trace(TOKENS).write(folder / "made-up.npz"), TOKENS, folder / "x")
    return folder / "x"


def reach(what: Any, found: int, chunk: int | None = None, base: int = 10) -> Reach:
    return Reach(what, base, found, chunk, 100, 10, 1.0, "memory")


def sample(first_s: float, decode_s: float, batch: int, peak: int = 100) -> dict[str, Any]:
    return {"first_token_s": first_s, "decode_s": decode_s, "batch": batch, "tokens": [0] * 5, "peak_bytes": peak}


def test_the_longest_passes_that_reach_as_far_are_run() -> None:
    prompts = [reach("prompt", 200), reach("prompt", 900, 64), reach("prompt", 950, 16)]
    assert to_run(prompts, "prompt", 1000) == prompts[2]
    assert (to_run(prompts, "prompt", 40).found, to_run(prompts, "prompt", 40).chunk) == (400, 64)
    assert (to_run(prompts, "prompt", 20).found, to_run(prompts, "prompt", 20).chunk) == (200, None)
    with pytest.raises(UsageError, match="no batch was planned"):
        to_run(prompts, "batch", 40)


def test_every_expert_runs_the_base_and_fewer_what_was_found() -> None:
    runs = runs_of(reach("prompt", 400, 64), MEMORY, ("exact", "resident"), 10)
    assert [(run.expert_memory, run.mode, run.prompt, run.batch, run.chunk) for run in runs] == [
        ("100%", "exact", 10, 1, None),
        ("60%", "exact", 400, 1, 64),
        ("60%", "resident", 400, 1, 64),
    ]
    assert [(run.prompt, run.batch) for run in runs_of(reach("batch", 33), MEMORY, ("exact",), 7)] == [(7, 10), (7, 33)]


def test_gains_are_ratios_of_medians_to_every_expert() -> None:
    runs = runs_of(reach("batch", 40), MEMORY, ("exact",), 7)
    for run, size in zip(runs, (10, 40), strict=True):
        for seconds in (1.0, 2.0, 3.0):
            outcome = Outcome(Contender("emoe", ExpertMemory.parse(run.expert_memory), run.mode), 80)
            outcome.samples[0] = sample(2 * seconds, seconds, size, peak=100 + int(seconds))
            note(run, outcome)
    assert runs[0].decode_tokens_per_s == [4 * 10 / seconds for seconds in (1, 2, 3)]
    assert runs[1].answered_per_s == [5 * 40 / (3 * seconds) for seconds in (1, 2, 3)]
    ((larger, decoding, answering),) = gains(runs)
    assert (larger, decoding, answering) == (runs[1], 4.0, 4.0)
    assert runs[0].off == pytest.approx(103 / 80 - 1)
    assert gains(runs[1:]) == []
    assert Run("batch", "60%", "exact", 1, 1, None).off is None


def test_rounds_take_turns_and_a_run_that_failed_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def fake(settings: DecodeSettings, say: Any) -> Any:
        budget = str(settings.budgets[0])
        asked.append((budget, settings.batch))
        outcome = Outcome(settings.contenders[0], 100)
        outcome.samples[0] = sample(1.0, 1.0, settings.batch)
        if budget == "60%":
            outcome.samples.clear()
            outcome.error = "it died"
        return type("Report", (), {"outcomes": [outcome]})

    monkeypatch.setattr(decode, "run", fake)
    runs = runs_of(reach("batch", 40), MEMORY, ("exact",), 7)
    measure(runs, DecodeSettings(new_tokens=3, warmups=0), 3, lambda _: None)
    assert asked == [("100%", 10), ("60%", 40), ("100%", 10), ("100%", 10)]
    assert (len(runs[0].peak_bytes), runs[1].error) == (3, "it died")


@pytest.mark.slow
def test_the_command_runs_what_it_planned(
    planted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Machine(
        {},
        memory_bytes_per_s={1: 1e10},
        disk_direct_bytes_per_s=1e9,
        disk_cached_bytes_per_s=4e9,
        flops={"bfloat16": {1: 1e11}},
    )
    monkeypatch.setattr(decode, "machine_of", lambda *_: made)
    asked = ["bench", "reach", str(planted), "--prompt", "16", "--batch", "1", "--new", "3", "--most-times", "3"]
    assert main([*asked, "--run", "batch", "-t", "1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    full, fewer = values["runs"]
    assert (full["batch"], full["expert_memory"], fewer["expert_memory"]) == (1, "100%", "60%")
    assert fewer["batch"] == min(3, values["reach"][-1]["found"]) > 1
    assert all(run["peak_bytes"][0] > 0 and run["decode_tokens_per_s"][0] > 0 for run in values["runs"])


@pytest.mark.parametrize(
    ("asked", "says"), [("batch", "is no planted checkpoint"), ("batch,rows", "'rows' cannot be run")]
)
def test_what_cannot_be_run_is_refused(asked: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "reach", str(nano.path()), "--run", asked]) == 2
    assert says in capsys.readouterr().err
