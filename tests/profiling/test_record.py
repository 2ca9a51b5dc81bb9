"""Recording in parts: the same trace however often it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe.model.bind import binding_of
from emoe.profiling.prompts import encode_all, read_prompts
from emoe.profiling.record import join, read_recorded, record, recording
from emoe.profiling.running import answer, judge
from emoe.routing.trace import DECODE, Trace

ARRAYS = (
    "experts",
    "weights",
    "phase",
    "step",
    "token_ids",
    "offsets",
    "task",
    "prompt_token_ids",
    "prompt_token_offsets",
)


class Stopped(Exception):
    """What a kill looks like to the code."""


def same(a: Trace, b: Trace) -> None:
    for name in ARRAYS:
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert (a.tasks, a.num_experts, a.prompts) == (b.tasks, b.num_experts, b.prompts)


def test_a_run_stopped_twice_records_what_one_run_does(loaded: Any, prompt_file: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded
    prompts = read_prompts(prompt_file)
    ids = encode_all(prompts, tokenizer, "tiny", None, 5)
    whole, answers = record(model, prompts, ids, 5, tmp_path / "whole", lambda *_: None)
    assert len(list((tmp_path / "whole").glob("*.npz"))) == 1

    folder = tmp_path / "stopped"
    for last in (2, 5):

        def stop(done: int, total: int, last: int = last) -> None:
            if done == last:
                raise Stopped

        with pytest.raises(Stopped):
            record(model, prompts, ids, 5, folder, stop, part_s=0)
    seen: list[int] = []
    trace, again = record(model, prompts, ids, 5, folder, lambda done, _: seen.append(done), part_s=0)
    assert seen == [4, 5, 6, 7, 8]  # the part that was running when it was stopped is made again
    same(trace, whole)
    for prompts_ in (8, 3):
        read = read_recorded(folder, prompts_)
        assert read is not None and [a.ids for a in read[1]] == [a.ids for a in answers]
        same(read[0], whole)
    assert read_recorded(folder, 9) is None and read_recorded(tmp_path / "nothing", 0) is None
    assert [a.ids for a in again] == [a.ids for a in answers]
    assert not binding_of(model).runtime.observers


def test_the_trace_holds_every_prompt_and_its_answer(loaded: Any, prompt_file: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded
    prompts = read_prompts(prompt_file)
    ids = encode_all(prompts, tokenizer, "tiny", None, 5)
    trace, answers = record(model, prompts, ids, 5, tmp_path / "routes", lambda *_: None)
    assert [trace.task_of(i) for i in range(8)] == ["maths", "chat"] * 4
    for i, (given, made) in enumerate(zip(ids, answers, strict=True)):
        rows = slice(trace.offsets[i], trace.offsets[i + 1])
        assert trace.token_ids is not None
        assert trace.token_ids[rows].tolist() == [*given, *made.ids[:-1]]  # the last token is never fed back
        assert (trace.phase[rows] == DECODE).sum() == len(made.ids) - 1
        assert made.cut == (len(made.ids) == 5 and made.ids[-1] != 2)
        assert made.prefill_s > 0
        assert (made.decode_s > 0) == (len(made.ids) > 1)


def test_an_error_while_recording_leaves_no_file_and_no_observer(loaded: Any, tmp_path: Path) -> None:
    model, _ = loaded
    with pytest.raises(Stopped), recording(model, tmp_path / "run.npz"):
        raise Stopped
    assert not list(tmp_path.iterdir())
    assert not binding_of(model).runtime.observers


def test_joining_keeps_labels_and_order(loaded: Any, tmp_path: Path) -> None:
    from emoe.model.bind import label_task

    model, _ = loaded
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    labelled: list[list[str | None]] = [["x", None], ["y", "x"]]
    for path, labels in zip(paths, labelled, strict=True):
        with recording(model, path):
            for label in labels:
                label_task(model, label)
                answer(model, [4, 5, 6], 3)
    traces = [Trace.read(path) for path in paths]
    joined = join(traces)
    assert [joined.task_of(i) for i in range(4)] == ["x", None, "y", "x"]
    assert (np.diff(joined.in_time()) == 1).all()
    assert (np.diff(joined.step[joined.phase == DECODE]) > 0).all()
    for i, (trace, prompt) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        assert np.array_equal(joined.select([i]).experts, traces[trace].select([prompt]).experts)


def test_judging_is_the_models_own_likelihood(loaded: Any) -> None:
    import torch

    model, _ = loaded
    likeliest, nll = judge(model, [4, 5, 6], [7, 8])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[4, 5, 6, 7, 8]])).logits[0].float().log_softmax(-1)
    assert nll == pytest.approx(-float(logits[2, 7] + logits[3, 8]), rel=1e-5)
    assert likeliest == logits[2:4].argmax(-1).tolist()
