"""Recording traces: batches, padding, packed tokens, misuse, runs that fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emoe.errors import UsageError
from emoe.routing.recorder import TraceWriter
from emoe.routing.trace import Trace


def ids_and_weights(tokens: int, k: int, seed: int, experts: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :k]
    return ids, torch.rand(tokens, k, generator=generator).to(torch.bfloat16)


def test_a_left_padded_batch_is_taken_apart_by_prompt(tmp_path: Path) -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    tokens = torch.arange(8).reshape(2, 4)
    routes = {
        (step, layer): ids_and_weights((8, 2)[step], 2, 10 * step + layer) for step in range(2) for layer in (1, 4)
    }
    with TraceWriter(tmp_path / "a.npz", layers=[1, 4], num_experts=8, top_k=2) as writer:
        short = writer.add_prompt("maths", token_ids=[2, 3], text="1+1")
        long = writer.add_prompt(token_ids=[4, 5, 6, 7])
        writer.begin_pass([short, long], "prefill", tokens_each=4, mask=mask, token_ids=tokens)
        for layer in (4, 1):  # the order of layers does not matter
            writer.record(layer, *routes[0, layer])
        writer.begin_pass([short, long], "decode", token_ids=torch.tensor([[90], [91]]))
        for layer in (1, 4):
            writer.record(layer, *routes[1, layer])
    trace = Trace.read(tmp_path / "a.npz")
    np.testing.assert_array_equal(trace.offsets, [0, 3, 8])
    np.testing.assert_array_equal(trace.token_ids, [2, 3, 90, 4, 5, 6, 7, 91])
    np.testing.assert_array_equal(trace.phase, [0, 0, 1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(trace.step, [0, 0, 1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(trace.layers, [1, 4])
    assert [trace.task_of(0), trace.task_of(1)] == ["maths", None]
    assert trace.prompts == ({"text": "1+1"}, {})
    np.testing.assert_array_equal(trace.prompt_token_ids, [2, 3, 4, 5, 6, 7])
    for position, layer in enumerate((1, 4)):
        prefill, decode = routes[0, layer][0].numpy(), routes[1, layer][0].numpy()
        expected = np.concatenate([prefill[2:4], decode[:1], prefill[4:], decode[1:]])
        np.testing.assert_array_equal(trace.experts[:, position], expected)
    assert trace.weights is not None
    gates = routes[1, 4][1].float().numpy()
    np.testing.assert_allclose(trace.weights[[2, 7], 1], gates, rtol=1e-3)
    np.testing.assert_array_equal(trace.token_ids[trace.in_time()], [2, 3, 4, 5, 6, 7, 90, 91])  # type: ignore[index]


def test_a_packed_batch_names_each_tokens_prompt_and_phase(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "a.npz", layers=[0], num_experts=300, top_k=2) as writer:
        first, second = writer.add_prompt(), writer.add_prompt()
        writer.begin_pass([second, first, second], ["prefill", "decode", "prefill"])
        writer.record(0, torch.tensor([[1, 2], [299, 4], [5, 6]]), torch.ones(3, 2))
    trace = Trace.read(tmp_path / "a.npz")
    assert trace.experts.dtype == np.uint16
    np.testing.assert_array_equal(trace.experts[:, 0], [[299, 4], [1, 2], [5, 6]])
    np.testing.assert_array_equal(trace.phase, [1, 0, 0])
    assert trace.token_ids is None
    assert trace.prompt_token_ids is None


def test_layers_left_out_and_smaller_k_are_not_computed(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "a.npz", layers=[0, 1, 2], num_experts=8, top_k=2) as writer:
        writer.begin_pass([writer.add_prompt()], "decode")
        writer.record(0, torch.tensor([[3, 4]]), torch.ones(1, 2))
        writer.record(2, torch.tensor([[5]]), torch.ones(1, 1))
    trace = Trace.read(tmp_path / "a.npz")
    np.testing.assert_array_equal(trace.experts[0], [[3, 4], [255, 255], [5, 255]])
    np.testing.assert_array_equal(trace.weights, [[[1, 1], [0, 0], [1, 0]]])


def test_a_trace_of_nothing_is_a_trace(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "a.npz", layers=[0], num_experts=8, top_k=2) as writer:
        writer.add_prompt("maths")
        writer.begin_pass([0], "prefill")
    trace = Trace.read(tmp_path / "a.npz")
    assert len(trace) == 0
    assert trace.num_prompts == 1
    assert trace.counts().shape == (1, 1, 8)


def test_nothing_is_written_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), TraceWriter(tmp_path / "a.npz", [0], 8, 2) as writer:
        writer.begin_pass([writer.add_prompt()], "prefill")
        writer.record(0, torch.tensor([[3, 4]]), torch.ones(1, 2))
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with pytest.raises(UsageError, match="is finished"):
        writer.add_prompt()


def test_finishing_twice_writes_once(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "a.npz", [0], 8, 2)
    path = writer.finish()
    path.unlink()
    assert writer.finish() == path
    assert not path.exists()
    with pytest.raises(UsageError, match="is finished"):
        writer.trace()


def writer_with_a_pass(tmp_path: Path) -> TraceWriter:
    writer = TraceWriter(tmp_path / "a.npz", [0, 3], 8, 2)
    writer.begin_pass([writer.add_prompt()], "prefill", tokens_each=2)
    return writer


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w.record(1, *ids_and_weights(2, 2, 0)), r"layer 1 is not one of the trace's; .*\[0, 3\]"),
        (lambda w: [w.record(0, *ids_and_weights(2, 2, 0)) for _ in range(2)], "layer 0 was recorded twice"),
        (lambda w: w.record(0, *ids_and_weights(3, 2, 0)), r"must both be \[2, at most 2\]"),
        (lambda w: w.record(0, *ids_and_weights(2, 3, 0)), r"must both be \[2, at most 2\]"),
        (lambda w: (w.record(0, torch.full((2, 2), 8), torch.ones(2, 2)), w.end_pass()), "expert ids 8 to 8 of 8"),
        (lambda w: (w.end_pass(), w.record(0, *ids_and_weights(2, 2, 0))), "begin_pass must come before"),
        (lambda w: w.begin_pass([1], "prefill"), r"prompts \[1\] were not all announced; 1 were"),
        (lambda w: w.begin_pass([0], "warmup"), "phase must be one of prefill, decode"),
        (lambda w: w.begin_pass([0, 0], ["decode", "warmup"]), "phase must be one of prefill, decode"),
        (lambda w: w.begin_pass([0, 0], ["decode"]), "or one for each prompt"),
        (lambda w: w.record(0, torch.zeros(2, 2, 1), torch.zeros(2, 2, 1)), r"must both be \[2, at most 2\]"),
        (lambda w: w.record(0, torch.zeros(2, 2), torch.zeros(2, 1)), r"must both be \[2, at most 2\]"),
        (lambda w: w.begin_pass([0], "decode", mask=np.ones(3)), "mask has 3 entries for a pass of 1 tokens"),
        (lambda w: w.add_prompt(path=Path("x")), "about of a trace must hold JSON values"),
    ],
)
def test_misuse_is_named(tmp_path: Path, call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(writer_with_a_pass(tmp_path))


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "a.npz", tmp_path):
        with pytest.raises(UsageError, match="cannot write a trace to"):
            TraceWriter(path, [0], 8, 2)
    with pytest.raises(UsageError, match="ascending"):
        TraceWriter(tmp_path / "a.npz", [1, 0], 8, 2)
