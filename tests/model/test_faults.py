"""Invariants 2, 3 and 8: bytes are bounded and add up; a fault ends one request with a message, and hangs nothing."""

from __future__ import annotations

import copy
import errno
import itertools
import os
import pickle
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import emoe
from emoe.errors import CheckpointError, ReadError, UnsupportedModelError, UsageError
from emoe.kernels.experts import ExpertMath
from emoe.model import bind
from emoe.model.bind import binding_of
from tests.families import make_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"), seed=2)


def tokens(seed: int, length: int = 10, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20)
@given(share=st.integers(26, 100), seed=st.integers(0, 999), batch=st.integers(1, 3), length=st.integers(1, 12))
def test_bytes_read_are_the_sum_of_the_loads(path: Path, share: int, seed: int, batch: int, length: int) -> None:
    """Invariant 3 without prefetches (test_ahead has them), and that a chunk reads an expert at most once per layer."""
    model, _ = emoe.load(path, expert_memory=f"{share}%")
    index = binding_of(model).index
    with torch.no_grad():
        before = emoe.stats(model)["layers"]
        model(tokens(seed, length, batch))
        after = emoe.stats(model)
    counters = {layer: c for pool in binding_of(model).pools for layer, c in pool.table.counters.items()}
    for layer, entry in after["layers"].items():
        loads = entry["loads"] - before[layer]["loads"]
        unasked = counters[layer].prefetches - counters[layer].prefetches_used  # of a layer to come, in a long prompt
        assert loads - unasked == entry["misses"] - before[layer]["misses"] <= entry["experts"]
        assert entry["bytes_read"] == entry["loads"] * index.stored_nbytes(layer, 0)
    assert after["bytes_read"] == sum(entry["bytes_read"] for entry in after["layers"].values())
    assert after["peak_resident_bytes"] <= after["budget_bytes"]
    emoe.close(model)


def _failing(model: object, fault: object) -> None:
    binding_of(model).reader._pread = fault  # type: ignore[assignment]


@pytest.mark.parametrize("length", [1, 10])
def test_a_read_error_ends_the_request_and_the_next_one_works(path: Path, length: int) -> None:
    model, _ = emoe.load(path, expert_memory="30%")
    whole, _ = emoe.load(path)
    working = os.preadv
    countdown = [3]

    def faulty(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        countdown[0] -= 1
        if countdown[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        return working(descriptor, buffers, offset)

    _failing(model, faulty)
    with torch.no_grad(), pytest.raises(ReadError, match="safetensors"):
        for seed in range(20):
            model(tokens(seed, length))
    _failing(model, working)
    with torch.no_grad():
        for seed in range(5):
            assert torch.equal(model(tokens(seed, 10)).logits, whole(tokens(seed, 10)).logits)
    for pool in binding_of(model).pools:
        assert all(slot.state.value in ("empty", "ready") for slot in pool.table.slots)


@pytest.fixture(scope="module")
def nano() -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    """emoe-nano in part, read directly, and whole."""
    models = emoe.load(expert_memory="30%", reader="direct")[0], emoe.load()[0]
    yield models
    for model in models:
        emoe.close(model)


@settings(max_examples=20)
@given(
    nth=st.integers(0, 400),
    fault=st.sampled_from(["EIO", "no memory", "short", "hangs"]),
    length=st.sampled_from([1, 24]),
    seed=st.integers(0, 999),
)
def test_a_fault_at_any_read_ends_one_request_of_emoe_nano(
    nano: tuple[PreTrainedModel, PreTrainedModel], nth: int, fault: str, length: int, seed: int
) -> None:
    part, whole = nano
    reads = itertools.count()

    def faulty(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if next(reads) != nth:
            return os.preadv(descriptor, buffers, offset)
        if fault == "EIO":
            raise OSError(errno.EIO, "Input/output error")
        if fault == "no memory":
            raise MemoryError
        if fault == "hangs":
            time.sleep(0.1)
        return os.preadv(descriptor, [buffers[0][:4096]], offset)

    def right(seed: int) -> None:
        assert torch.equal(part(tokens(seed, length)).logits, whole(tokens(seed, length)).logits)

    _failing(part, faulty)
    message = ""
    with torch.no_grad():
        try:
            for more in range(3):
                right(seed + more)
        except ReadError as error:
            message = str(error)
        _failing(part, os.preadv)
        right(seed + 3)
    if next(reads) > nth and fault == "EIO":
        assert not message or re.search(
            r"model\.safetensors: reading [\d,]+ bytes at byte [\d,]+ .*Check the disk", message
        )
    elif next(reads) > nth and fault == "no memory":
        assert not message or re.search(r"expert \d+ of layer \d+ of .*no memory left.*smaller budget", message)
    else:
        assert not message  # a short read is continued, a slow one waited for
    for pool in binding_of(part).pools:
        assert all(slot.state.value in ("empty", "ready") for slot in pool.table.slots)


def test_a_shard_truncated_while_running_is_named(tmp_path: Path) -> None:
    path = make_checkpoint("mixtral", tmp_path, seed=2)
    model, _ = emoe.load(path, expert_memory="30%", reader="cached")
    shard = path / "model.safetensors"
    os.truncate(shard, shard.stat().st_size // 4)
    with torch.no_grad(), pytest.raises(ReadError, match=r"model\.safetensors"):
        for seed in range(20):
            model(tokens(seed))


def test_a_truncated_shard_is_refused_before_any_work(tmp_path: Path) -> None:
    path = make_checkpoint("mixtral", tmp_path, seed=2)
    shard = path / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 8)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        emoe.load(path)


def test_a_slow_disk_changes_nothing_but_time(path: Path) -> None:
    model, _ = emoe.load(path, expert_memory="30%")
    whole, _ = emoe.load(path)

    def slow(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        time.sleep(0.003)
        return os.preadv(descriptor, buffers, offset)

    _failing(model, slow)
    with torch.no_grad():
        for seed in range(3):
            assert torch.equal(model(tokens(seed)).logits, whole(tokens(seed)).logits)
    assert emoe.stats(model)["load_wait_s"] > 0.003


@settings(max_examples=12)
@given(
    share=st.integers(26, 90),
    lengths=st.lists(st.sampled_from([1, 1, 1, 3, 12]), min_size=1, max_size=4),
    kind=st.sampled_from(["cached", "direct"]),
    seed=st.integers(0, 10**6),
)
def test_the_order_in_which_loads_end_changes_no_bit(
    path: Path, whole: PreTrainedModel, share: int, lengths: list[int], kind: str, seed: int
) -> None:
    model, _ = emoe.load(path, expert_memory=f"{share}%", reader=kind)
    draw = random.Random(seed)

    def late(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        time.sleep(draw.choice([0, 0, 0.001, 0.004]))
        return os.preadv(descriptor, buffers, offset)

    _failing(model, late)
    try:
        with torch.no_grad():
            for number, length in enumerate(lengths):
                ids = tokens(seed + number, length)
                assert torch.equal(model(ids).logits, whole(ids).logits)
        assert emoe.stats(model)["peak_resident_bytes"] <= emoe.stats(model)["budget_bytes"]
    finally:
        emoe.close(model)


@pytest.fixture(scope="module")
def whole(path: Path) -> Iterator[PreTrainedModel]:
    model, _ = emoe.load(path)
    yield model
    emoe.close(model)


@pytest.mark.parametrize("length", [1, 12])
def test_a_load_that_fails_while_others_are_computed_ends_the_request(
    path: Path, whole: PreTrainedModel, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = emoe.load(path, expert_memory="60%")
    computing, failed = threading.Event(), threading.Event()

    def faulty(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not computing.wait(5):
            return os.preadv(descriptor, buffers, offset)
        failed.set()
        raise OSError(errno.EIO, "Input/output error")

    activate = ExpertMath.natively

    def natively(self: ExpertMath, *args: Any) -> Any:  # asked for whenever something is computed
        computing.set()
        return activate(self, *args)

    try:
        with torch.no_grad():
            model(tokens(0))  # something is resident
            _failing(model, faulty)
            monkeypatch.setattr(ExpertMath, "natively", natively)
            with pytest.raises(ReadError, match="safetensors"):
                for seed in range(1, 40):
                    computing.clear()
                    model(tokens(seed, length))
            assert failed.is_set()
            monkeypatch.undo()
            _failing(model, os.preadv)
            for seed in range(3):
                assert torch.equal(model(tokens(seed, length)).logits, whole(tokens(seed, length)).logits)
        for pool in binding_of(model).pools:
            assert all(slot.state.value in ("empty", "ready") for slot in pool.table.slots)
    finally:
        emoe.close(model)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_loader_threads_that_die_do_not_hang_a_request(path: Path) -> None:
    model, _ = emoe.load(path, expert_memory="30%")
    main = threading.get_ident()

    def deadly(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if threading.get_ident() != main:
            raise SystemExit  # ends the loader thread, as nothing catches it
        return os.preadv(descriptor, buffers, offset)

    _failing(model, deadly)
    failures = 0
    with torch.no_grad():
        for seed in range(8):
            try:
                model(tokens(seed))
            except ReadError as error:
                failures += 1
                assert "layer" in str(error)
        whole, _ = emoe.load(path)
        assert torch.equal(model(tokens(99)).logits, whole(tokens(99)).logits)
    assert failures <= 2  # one for each loader thread: afterwards the request's own thread reads


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"Llama.* is a dense model"):
        emoe.load(tmp_path)


def test_training_a_closed_model_and_a_foreign_model_are_refused(path: Path) -> None:
    model, _ = emoe.load(path, expert_memory="50%")
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(UsageError, match="inference only"):
        model(tokens(0))
    with torch.no_grad():
        model(tokens(0))
    emoe.close(model)
    emoe.close(model)
    with torch.no_grad(), pytest.raises(UsageError, match="closed"):
        model(tokens(0))
    with pytest.raises(UsageError, match=r"not made by emoe\.load"):
        emoe.stats(torch.nn.Linear(1, 1))


def test_no_expert_byte_is_allocated_outside_the_slots(path: Path) -> None:
    model, _ = emoe.load(path, expert_memory="30%")
    names = {name for name, _ in model.named_parameters()}
    assert not any(".experts." in name for name in names)
    assert all(parameter.device.type != "meta" for parameter in model.parameters())
    assert not model.config.to_dict().get("quantization_config")
    assert not getattr(model, "is_quantized", False)


def test_saving_would_lose_the_experts_and_is_refused(path: Path, tmp_path: Path) -> None:
    model, _ = emoe.load(path, expert_memory="50%")
    with pytest.raises(UsageError, match="lose the experts"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copying_would_need_threads_and_files_and_is_refused(path: Path, copied: Callable[[object], object]) -> None:
    model, _ = emoe.load(path, expert_memory="50%")
    with pytest.raises(UsageError, match="cannot be copied or pickled"):
        copied(model)


def test_a_damaged_tokenizer_is_called_that(path: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(path, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        emoe.load(broken, expert_memory="50%")


def test_a_tokenizer_of_an_older_kind_names_the_packages_that_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers itself names one package, and not always the one that helps."""
    path = make_checkpoint("mixtral", tmp_path, seed=4)
    (path / "tokenizer.model").write_bytes(b"no model")
    monkeypatch.setattr(bind, "_installed", lambda package: package == "tiktoken")
    with pytest.raises(CheckpointError, match=r"no tokenizer.json.*pip install sentencepiece protobuf; or add"):
        emoe.load(path)
    monkeypatch.setattr(bind, "_installed", lambda package: True)
    with pytest.raises(CheckpointError, match="Download its tokenizer files again"):
        emoe.load(path)


def test_experts_follow_a_cast_of_the_dense_weights(path: Path) -> None:
    model, _ = emoe.load(path, expert_memory="50%")
    expected = model(tokens(0)).logits
    model.to(torch.bfloat16)
    assert model(tokens(0)).logits.dtype == torch.bfloat16
    torch.testing.assert_close(model(tokens(0)).logits.float(), expected, rtol=0.2, atol=0.2)


def test_a_collected_model_stops_its_threads_and_frees_its_bank(path: Path) -> None:
    import gc
    import weakref

    model, _ = emoe.load(path, expert_memory="50%")
    loader = binding_of(model).loader
    bank = weakref.ref(binding_of(model).pools[0].bank)
    del model
    gc.collect()
    assert not any(thread.is_alive() for thread in loader._threads)
    assert bank() is None
