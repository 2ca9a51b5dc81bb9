"""The predictor's own process, with real processes."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.prediction.registry import make_predictor
from emoe.prediction.worker import Answer, PredictorDiedError, PredictorProcess
from emoe.prediction.worker_child import memory_bytes, read_frame, write_frame
from tests.prediction.histories import random_routes

SHAPE = RoutingShape(3, 8, 2)
DEADLINE_S = 60.0


@pytest.fixture
def opened() -> Iterator[Callable[..., PredictorProcess]]:
    """`PredictorProcess(...)`, closed at the end."""
    processes: list[PredictorProcess] = []

    def make(name: str, **settings: Any) -> PredictorProcess:
        processes.append(PredictorProcess(name, SHAPE, **settings))
        return processes[-1]

    yield make
    for process in processes:
        process.close()


@pytest.fixture
def slow_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that registers "slow", whose predictions take a minute."""
    text = """
        import time
        from emoe.prediction.popularity import Static
        from emoe.prediction.registry import PREDICTORS

        class Slow(Static):
            def predict(self, task):
                time.sleep(60)
                return super().predict(task)

        PREDICTORS["slow"] = Slow
    """
    (tmp_path / "registers_slow.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    return "registers_slow"


def until(what: Callable[[], Any]) -> Any:
    """What it returns once that is true."""
    end = time.monotonic() + DEADLINE_S
    while not (found := what()):
        assert time.monotonic() < end, "nothing came in time"
        time.sleep(0.01)
    return found


def answer_of(process: PredictorProcess) -> Answer:
    answer = until(process.poll)
    assert isinstance(answer, Answer)
    return answer


def test_the_child_predicts_what_the_predictor_would(opened: Callable[..., PredictorProcess]) -> None:
    rng, here = np.random.default_rng(0), make_predictor("task-popularity", SHAPE)
    process = opened("task-popularity")
    for task in ("a", "b", None, "a"):
        routes = random_routes(rng, SHAPE, 5, missing=0.2)
        for predictor in (here, process):
            predictor.begin_prompt(task)
            predictor.observe(routes[:2])
            predictor.observe(routes[2:])
        routes[:] = 0
    assert process.poll() is None or process.ready
    ticket = process.ask("a")
    answer = answer_of(process)
    np.testing.assert_array_equal(answer.shares, here.predict("a"))
    assert answer.ticket == ticket and answer.seconds >= 0
    assert process.poll() is None
    assert process.ready and process.memory_bytes() > 2**20
    assert process.dropped == process.superseded == 0
    assert process.ask("b") > ticket


def test_a_state_crosses_bit_for_bit(opened: Callable[..., PredictorProcess]) -> None:
    from tests.prediction.test_emoe_sequence import fitted_small

    predictor = fitted_small("emoe-a")
    process = opened("emoe-a", state=predictor.state())
    routes = random_routes(np.random.default_rng(1), SHAPE, 4)
    for one in (predictor, process):
        one.begin_prompt("a")
        one.observe(routes)
    process.ask("b")
    np.testing.assert_array_equal(answer_of(process).shares, predictor.predict("b"))


def test_a_killed_child_is_named_at_the_next_call(opened: Callable[..., PredictorProcess]) -> None:
    process = opened("static")
    until(lambda: process.ready)
    os.kill(process.pid, signal.SIGKILL)

    def died() -> bool:
        try:
            process.poll()
        except PredictorDiedError as error:
            assert f"of predictor static (pid {process.pid}) ended with signal 9" in str(error)
            return True
        return False

    until(died)
    for call in (process.poll, lambda: process.ask(None), lambda: process.begin_prompt(None)):
        with pytest.raises(PredictorDiedError, match="start another"):
            call()
    process.close()


def test_what_the_child_said_last_is_in_the_error(opened: Callable[..., PredictorProcess]) -> None:
    process = opened("no-such-predictor")
    with pytest.raises(PredictorDiedError, match=r"exit code 1: (.|\n)*no predictor is called 'no-such-predictor'"):
        until(lambda: process.poll() is not None)


def test_closing_does_not_wait_for_a_prediction(opened: Callable[..., PredictorProcess], slow_module: str) -> None:
    process = opened("slow", imports=[slow_module])
    until(lambda: process.ready)
    process.ask(None)
    big = np.zeros((20_000, 3, 2), dtype=np.uint8)
    for _ in range(8):
        process.observe(big)  # far more than a pipe holds: the sending thread is stuck in a write
    pid = process.pid
    process.close()
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(UsageError, match="was closed"):
        process.ask(None)


def test_a_full_queue_drops_the_oldest_observations_and_says_so(
    opened: Callable[..., PredictorProcess], slow_module: str, caplog: pytest.LogCaptureFixture
) -> None:
    process = opened("slow", imports=[slow_module], max_pending=4)
    until(lambda: process.ready)
    process.ask(None)
    big = np.zeros((20_000, 3, 2), dtype=np.uint8)
    for _ in range(3):
        process.observe(big)
    until(lambda: len(process._pending) < 3)  # one is stuck in the pipe
    for _ in range(9):
        process.begin_prompt("a")
        process.observe(big)
    assert process.dropped >= 9
    assert len(process._pending) <= 4
    assert "does not keep up" in caplog.text and len(caplog.records) == 1
    first, second = process.ask(None), process.ask(None)
    assert first < second and process.superseded == 1


def test_wrong_arguments_are_refused_before_a_process_starts() -> None:
    with pytest.raises(UsageError, match="max_pending is 1"):
        PredictorProcess("static", SHAPE, max_pending=1)


def test_wrong_routes_are_refused_here_and_not_in_the_child(opened: Callable[..., PredictorProcess]) -> None:
    process = opened("static")
    with pytest.raises(UsageError, match="do not fit 3 MoE layers"):
        process.observe(np.zeros((1, 2, 2), dtype=np.uint8))
    process.ask(None)
    np.testing.assert_array_equal(answer_of(process).shares, SHAPE.uniform())


def test_the_child_dies_with_its_parent_and_no_main_guard_is_needed() -> None:
    """The parent is a plain script that is killed; its child must end by itself."""
    script = """
        from emoe.prediction.protocol import RoutingShape
        from emoe.prediction.worker import PredictorProcess
        import time
        process = PredictorProcess("static", RoutingShape(3, 8, 2))
        while not process.ready:
            time.sleep(0.01)
        print(process.pid, flush=True)
        time.sleep(60)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()

    def gone() -> bool:
        try:
            return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    until(gone)


@given(
    header=st.dictionaries(st.sampled_from(["kind", "task", "ticket"]), st.none() | st.text() | st.integers()),
    size=st.none() | st.tuples(st.integers(0, 4), st.integers(0, 3)),
    cut=st.integers(0, 400),
)
def test_frames_survive_and_cut_ones_are_an_end(header: dict[str, Any], size: tuple[int, int] | None, cut: int) -> None:
    array = None if size is None else np.arange(size[0] * size[1], dtype=np.uint16).reshape(size)
    pipe = io.BytesIO()
    write_frame(pipe, header, array)
    whole = pipe.getvalue()
    found = read_frame(io.BytesIO(whole))
    assert found is not None
    assert {key: found[0][key] for key in header} == header
    if array is None:
        assert found[1] is None
    else:
        assert found[1] is not None
        np.testing.assert_array_equal(found[1], array)
    if cut < len(whole):
        assert read_frame(io.BytesIO(whole[:cut])) is None


def test_memory_is_that_of_this_process() -> None:
    assert 2**20 < memory_bytes() < 2**40
