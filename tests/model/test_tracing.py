"""A recorded trace is what the model's routers chose: every token but padding, in order, with its labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import emoe
from emoe.errors import UsageError
from emoe.model import label_task
from emoe.model.bind import binding_of
from emoe.routing.trace import Trace
from tests.families import make_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("deepseek_v3", tmp_path_factory.mktemp("deepseek"), seed=6)


@pytest.mark.parametrize("mode", ["exact", "resident"])
def test_a_trace_holds_the_routers_own_choices(path: Path, tmp_path: Path, mode: Any) -> None:
    model, _ = emoe.load(path, expert_memory="60%", mode=mode, trace=tmp_path / "run.npz", task="maths")
    chosen: dict[int, list[torch.Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts"):

            def keep(module: object, args: object, output: Any, number: int = number) -> None:
                chosen.setdefault(number, []).append(output[2])

            layer.mlp.gate.register_forward_hook(keep, prepend=True)
    ids = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    label_task(model, "code")
    model(input_ids=ids[:1])
    emoe.close(model)

    trace = Trace.read(tmp_path / "run.npz")
    assert trace.num_prompts == 3
    assert [trace.task_of(p) for p in range(3)] == ["maths", "maths", "code"]
    assert np.diff(trace.offsets).tolist() == [6 + 3, 4 + 3, 6]
    assert sorted(chosen) == trace.layers.tolist()
    for column, layer in enumerate(trace.layers.tolist()):
        prefill, *steps, last = chosen[layer]
        rows = prefill.view(2, 6, -1)
        first = torch.cat([rows[0], *[step[0:1] for step in steps]])
        second = torch.cat([rows[1, 2:], *[step[1:2] for step in steps]])
        expected = torch.cat([first, second, last])
        assert np.array_equal(trace.experts[:, column], expected.numpy())
    assert trace.phase[:9].tolist() == [0] * 6 + [1] * 3
    assert trace.prompt_token_ids is not None
    assert trace.prompt_token_ids.tolist() == [*ids[0].tolist(), *ids[1, 2:].tolist(), *ids[0].tolist()]
    assert trace.token_ids is not None
    assert trace.token_ids[6:9].tolist() == out[0, 6:9].tolist()


def test_a_trace_that_cannot_be_written_is_refused_before_loading_ends(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write a trace"):
        emoe.load(path, trace=tmp_path / "missing" / "run.npz")


def test_sequences_that_have_ended_are_left_out(path: Path, tmp_path: Path) -> None:
    model, _ = emoe.load(path, trace=tmp_path / "run.npz")
    ids = torch.randint(3, 128, (3, 5), generator=torch.Generator().manual_seed(4))
    free = model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    emoe.close(model)
    end = int(free[0, 6])  # the second token that the first sequence generates

    model, _ = emoe.load(path, trace=tmp_path / "run.npz")
    binding_of(model).runtime.end_tokens = frozenset({end})
    out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0)
    emoe.close(model)
    trace = Trace.read(tmp_path / "run.npz")
    for row in range(3):
        generated = out[row, 5:].tolist()
        fed = generated.index(end) if end in generated else 6 - 1  # tokens of the answer that were run
        assert trace.offsets[row + 1] - trace.offsets[row] == 5 + fed
