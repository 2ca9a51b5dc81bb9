"""What experiments share: prompts on two sides, what is kept, and what a run that goes on must have in common."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import emoe.bench.reproduce.workbench
import emoe.profiling.record
from emoe.bench.reproduce import room
from emoe.bench.reproduce.asked import QUICK_PROMPTS, Settings
from emoe.bench.reproduce.keeping import forget
from emoe.bench.reproduce.sources import by_task, left_out, sources
from emoe.bench.reproduce.workbench import Workbench
from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.routing.counts import PromptCounts
from emoe.routing.trace import Trace, TraceError
from tests.bench.reproduce.conftest import Open
from tests.prediction.histories import random_routes, trace_of

SHAPE = RoutingShape(2, 6, 2)


def some_trace(prompts: int, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    return trace_of(SHAPE, [random_routes(rng, SHAPE, 5) for _ in range(prompts)], ["a", "b"] * (prompts // 2))


def test_every_other_prompt_of_a_task_is_learned_from(open_bench: Open) -> None:
    bench = open_bench()
    lines = {side: [prompt.line for prompt in prompts] for side, prompts in bench.prompts.items()}
    assert lines == {"score": [1, 2, 5, 6, 9, 10], "learn": [3, 4, 7, 8, 11, 12]}
    assert bench.tasks == ("maths", "chat") and bench.pick("few", "many") == "many"


def test_a_quick_pass_takes_the_first_of_each_task(open_bench: Open, prompt_file: Path) -> None:
    bench = open_bench(quick=True, learn=prompt_file)
    for prompts in bench.prompts.values():
        assert [prompt.line for prompt in prompts] == list(range(1, 2 * QUICK_PROMPTS + 1))
    assert bench.pick("few", "many") == "few" and bench.new_tokens == 3


def test_a_run_plans_once_whatever_becomes_free_meanwhile(open_bench: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that was found to fit must not be refused, and another's kept plan not be taken, as memory changes."""
    made: list[str | int | None] = []

    def plan(folder: Path, **asked: Any) -> Any:
        made.append(asked["expert_memory"])
        return len(made)

    monkeypatch.setattr(emoe.bench.reproduce.workbench, "plan", plan)
    bench = open_bench()
    plans: list[Any] = [bench.planned(share) for share in ("60%", None, "60%", None)]
    assert plans == [1, 2, 1, 2]
    assert made == ["60%", None]


def test_a_run_that_is_judged_again_refuses_nothing(open_bench: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = SimpleNamespace(fit="none", total_bytes=2, memory_bytes=1, memory_source="given")
    bench = open_bench()
    monkeypatch.setattr(bench, "planned", lambda experts: tight)
    assert "60% of the experts resident takes 2 B" in str(room.refusal(bench, "60%"))
    bench.frozen = True
    assert room.refusal(bench, "60%") is None


def test_what_cannot_be_run_is_refused(open_bench: Open, tmp_path: Path, tiny: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"task": "maths", "prompt": "add"}\n')
    with pytest.raises(UsageError, match="no prompt to learn from is of the task 'chat'"):
        open_bench(learn=other)
    with pytest.raises(UsageError, match="give --prompts FILE"):
        open_bench(prompts=None)
    with pytest.raises(TraceError, match="no trace at"):
        open_bench(traces=(("x", tmp_path / "none.npz"),))
    with pytest.raises(UsageError, match=r"none\.csv cannot be read"):
        open_bench(arrivals=tmp_path / "none.csv")


def test_a_cell_is_computed_once(open_bench: Open) -> None:
    calls: list[int] = []

    def compute(number: int) -> Any:
        calls.append(number)
        return {"pair": (number, 2.5)}

    bench = open_bench()
    first = bench.cell("fig0", {"number": 1}, lambda: compute(1))
    again = open_bench().cell("fig0", {"number": 1}, lambda: compute(1))
    assert first == again == {"pair": [1, 2.5]}, "what comes back is what was kept, the first time too"
    bench.cell("fig0", {"number": 2}, lambda: compute(2))
    bench.cell("fig00", {"number": 1}, lambda: compute(3))
    assert calls == [1, 2, 3]
    with pytest.raises(UsageError):
        bench.cell("fig0", {"number": 4}, _refuse)
    assert bench.cell("fig0", {"number": 4}, lambda: 4) == 4


def _refuse() -> Any:
    raise UsageError("no")


def test_a_run_killed_in_the_middle_goes_on_after_its_last_cell(open_bench: Open) -> None:
    keys = [{"number": number} for number in range(5)]
    bench = open_bench()
    child = os.fork()
    if child == 0:  # killed as by the kernel, while the fourth cell is made
        bench.cells("fig0", keys, lambda number: number if number < 3 else os.kill(os.getpid(), signal.SIGKILL))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    made: list[int] = []
    steps: list[tuple[str, int, int]] = []
    bench = open_bench()
    bench.step = lambda *state: steps.append(state)
    assert bench.cells("fig0", keys, lambda number: made.append(number) or number) == [0, 1, 2, 3, 4]  # type: ignore[func-returns-value]
    assert made == [3, 4]
    assert steps[0] == ("fig0", 0, 5) and steps[-1] == ("fig0", 5, 5)


def test_answers_and_routes_are_recorded_once(open_bench: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, answers = open_bench().recorded("score")
    assert trace.num_prompts == len(answers) == 6
    assert [trace.task_of(prompt) for prompt in range(2)] == ["maths", "chat"]
    assert all(len(answer.ids) <= 3 for answer in answers)
    monkeypatch.setattr(emoe.profiling.record, "answer", _refuse)
    again, kept = open_bench().recorded("score")
    assert kept == answers and (again.experts == trace.experts).all()


def test_long_prompts_lose_their_middle(open_bench: Open) -> None:
    whole, cut = open_bench().ids("learn"), open_bench_cut(open_bench)
    for before, after in zip(whole, cut, strict=True):
        assert after == (before if len(before) <= 5 else before[:2] + before[-3:])
    assert max(map(len, whole)) > 5


def open_bench_cut(open_bench: Open) -> list[list[int]]:
    bench = open_bench()
    bench.settings = Settings(bench.settings.out, prompt_tokens=5)
    return bench.ids("learn")


@pytest.mark.parametrize("other", [{"seed": 1}, {"quick": True}, {"threads": 2}, {"new_tokens": 4}])
def test_a_run_with_other_settings_is_refused(open_bench: Open, other: dict[str, Any]) -> None:
    mark = open_bench().mark
    with pytest.raises(UsageError, match=f"holds a run with other .*{next(iter(other))}.*--fresh"):
        open_bench(**other)
    assert open_bench().mark == mark


def test_other_prompts_and_another_model_are_refused(open_bench: Open, tmp_path: Path, prompt_file: Path) -> None:
    bench = open_bench()
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(prompt_file.read_text().splitlines(keepends=True)[:8]))
    with pytest.raises(UsageError, match="other prompts"):
        open_bench(prompts=fewer)
    with pytest.raises(UsageError, match="other model"):
        Workbench(Settings(bench.settings.out, prompts=prompt_file, new_tokens=3), bench.step, bench.say)


def test_beginning_anew_forgets_what_was_kept(open_bench: Open) -> None:
    bench = open_bench()
    bench.cell("fig0", {}, lambda: 1)
    forget(bench.settings.out)
    anew = open_bench(seed=5)
    assert anew.cell("fig0", {}, lambda: 2) == 2
    forget(bench.settings.out)
    assert open_bench().mark != bench.mark, "findings of before are not taken for those of the new run"


def test_traces_may_be_added_to_a_run(open_bench: Open, tmp_path: Path) -> None:
    plain = open_bench()
    plain.cell("fig0", {}, lambda: 1)
    file = some_trace(6).write(tmp_path / "trace.npz")
    added = open_bench(traces=(("other", file),))
    assert added.cell("fig0", {}, lambda: 2) == 1, "what was computed stays"
    assert added.mark != plain.mark, "its findings are made anew"
    some_trace(6, seed=1).write(file)
    assert open_bench(traces=(("other", file),)).mark != added.mark
    assert open_bench().mark == plain.mark


def test_sources_are_the_models_own_routes_and_halves_of_each_trace(open_bench: Open, tmp_path: Path) -> None:
    counts = some_trace(8).counts()
    labels = np.array([0, 1] * 4)
    np.savez(
        tmp_path / "counts.npz",
        counts=counts.astype(np.uint16),
        n_tokens=np.full(8, 5),
        subject=labels,
        subjects=np.array(["a", "b"]),
    )
    routes = some_trace(6).write(tmp_path / "trace.npz")
    bench = open_bench(traces=(("other", routes), ("counted", tmp_path / "counts.npz")))
    own, other, counted = sources(bench)
    assert (own.name, own.learn.num_prompts, own.score.num_prompts) == (bench.name, 6, 6)
    assert (other.learn.num_prompts, other.score.num_prompts, other.ordered) == (3, 3, True)
    both = np.concatenate([other.learn.experts, other.score.experts])
    assert sorted(map(bytes, both)) == sorted(map(bytes, Trace.read(routes).experts))
    assert isinstance(bench.traces["counted"], PromptCounts) and not counted.ordered
    # Less what every prompt of a label has in common, and the order of tokens made up.
    left = counts.copy()
    for label in (0, 1):
        left[labels == label] -= counts[labels == label].min(axis=0)
    assert (counted.learn.counts().sum(axis=0) + counted.score.counts().sum(axis=0) == left.sum(axis=0)).all()
    assert [source.name for source in sources(bench, ordered=True)] == [bench.name, "other"]
    assert "counted" in left_out(bench)[0]
    order = by_task(own.score, 0)
    assert sorted(order) == list(range(6)) and sorted(own.score.task[order]) == own.score.task[order].tolist()


def test_a_trace_of_too_few_prompts_is_refused(open_bench: Open, tmp_path: Path) -> None:
    file = some_trace(2).write(tmp_path / "trace.npz")
    with pytest.raises(UsageError, match="the trace short holds 2 prompts"):
        sources(open_bench(traces=(("short", file),)))


def test_the_report_knows_what_the_run_was_of(open_bench: Open) -> None:
    about = open_bench().about()
    assert about["prompts scored"] == 6 and about["tokens of an answer"] == 3 and "torch" in about["versions"]
    json.dumps(about)
