"""The input embedding from disk: the same bits, fewer bytes, and errors that name what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

import emoe
from emoe.checkpoint.index import build_index, skeleton
from emoe.checkpoint.lookup import find_lookup
from emoe.errors import ReadError, UnsupportedModelError, UsageError
from emoe.model import embedding
from emoe.model.bind import binding_of
from emoe.model.embedding import RowsOnDisk, choose_embeddings
from emoe.planner import facts_of, plan
from tests.families import make_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"), seed=2)


def table_of(model: PreTrainedModel) -> RowsOnDisk:
    found = binding_of(model).embedding
    assert found is not None
    return found


def outputs(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Logits of a left-padded batch and of three greedy steps, and what the embedding module gives."""
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, use_cache=True)
        found = [model.get_input_embeddings()(ids), out.logits]
        for _ in range(3):
            step = out.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones_like(step)], dim=1)
            out = model(input_ids=step, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return found


@pytest.mark.parametrize("name", ["gemma4_text", "gpt_oss", "jamba", "deepseek_v3", "qwen3_next", "minimax_m2"])
def test_every_bit_is_that_of_an_embedding_in_memory(name: str, tmp_path: Path) -> None:
    """Prefill, decode, a batch with padding. gemma4's module scales what it looked up, by a buffer of its own."""
    folder = make_checkpoint(name, tmp_path, seed=1, dtype=torch.bfloat16)
    _, empty = skeleton(folder, dtype="auto")
    index = build_index(folder, empty)
    assert index.lookup is not None
    assert facts_of(folder)[1].lookup_bytes == index.lookup.nbytes
    ids = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    loaded = [emoe.load(folder, embeddings=where, dtype="auto")[0] for where in ("memory", "disk")]
    plain, model = loaded
    assert [s["embeddings"]["place"] for s in map(emoe.stats, loaded)] == ["memory", "disk"]
    for wanted, found in zip(outputs(plain, ids, mask), outputs(model, ids, mask), strict=True):
        assert torch.equal(wanted, found)
    spared = sum(p.nbytes for p in plain.parameters()) - sum(p.nbytes for p in model.parameters())
    assert spared == index.lookup.nbytes == emoe.stats(model)["embeddings"]["bytes_spared"]
    assert model.device == plain.device
    assert model.dtype == plain.dtype
    emoe.close(model)
    with pytest.raises(ReadError, match="is closed"):
        model(input_ids=ids)


def test_a_tied_embedding_stays_in_memory(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path, seed=1, tie_word_embeddings=True)
    with pytest.raises(UnsupportedModelError, match="embeddings='disk': the input embedding is tied"):
        emoe.load(folder, embeddings="disk")
    with pytest.raises(UnsupportedModelError, match="is tied to another weight"):
        plan(folder, embeddings="disk")
    model, _ = emoe.load(folder, expert_memory="60%", embeddings="auto")
    assert emoe.stats(model)["embeddings"]["place"] == "memory"
    assert emoe.stats(model)["embeddings"]["reason"].startswith("the input embedding is tied")
    assert plan(folder, expert_memory="60%", embeddings="auto").embeddings == "memory"


def test_the_plan_counts_what_is_loaded(path: Path) -> None:
    plain, disk = plan(path), plan(path, embeddings="disk")
    model, _ = emoe.load(path, embeddings="disk")
    assert disk.dense_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert plain.dense_bytes - disk.dense_bytes == disk.lookup_bytes == table_of(model).lookup.nbytes
    assert (disk.embeddings, plan(path, embeddings="auto").embeddings) == ("disk", "memory")
    assert plan(path, expert_memory="60%", embeddings="auto").embeddings == "disk"
    # What the embedding takes no more, the experts get: here it makes the difference between some and all.
    memory = plain.total_bytes - 1
    assert plan(path, memory=memory).fit == "some"
    auto = plan(path, memory=memory, embeddings="auto")
    assert (auto.fit, auto.embeddings) == ("all", "disk")
    less = plan(path, memory=memory - disk.lookup_bytes - 1)
    more = plan(path, memory=memory - disk.lookup_bytes - 1, embeddings="auto")
    assert more.budget_bytes - less.budget_bytes == disk.lookup_bytes


class Scaled(nn.Embedding):
    """As some families have it: the module multiplies what it looked up."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * torch.tensor(3.0).to(self.weight.dtype)


def test_what_a_module_does_around_its_look_up_stays_its_own(path: Path) -> None:
    model, _ = emoe.load(path, embeddings="disk")
    plain, _ = emoe.load(path)
    ids = torch.tensor([[5, 0, 5, 127]])
    for each in (plain, model):
        each.get_input_embeddings().__class__ = Scaled
    table_of(model)._forward = Scaled.forward.__get__(model.get_input_embeddings())
    assert torch.equal(model.get_input_embeddings()(ids), plain.get_input_embeddings()(ids))
    assert torch.equal(plain.get_input_embeddings()(ids), 3 * plain.get_input_embeddings().weight[ids])
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # anything but a look-up
        (model.get_input_embeddings().weight.sum() + 1).item()


@settings(max_examples=60)
@given(st.lists(st.integers(0, 127), min_size=1, max_size=40), st.integers(1, 40))
def test_rows_are_those_of_the_table_and_read_once(path: Path, ids: list[int], at_once: int) -> None:
    model, plain = _pair(path)
    table, weight = table_of(model), plain.get_input_embeddings().weight
    before = table.rows_read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "ROWS_AT_ONCE", at_once)
        assert torch.equal(table.rows(torch.tensor(ids)), weight[torch.tensor(ids)])
    assert table.rows_read - before == len(set(ids))
    assert table.bytes_read == table.rows_read * weight[0].nbytes


_PAIRS: dict[Path, tuple[PreTrainedModel, PreTrainedModel]] = {}


def _pair(path: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """One on disk and one in memory, loaded once."""
    if path not in _PAIRS:
        _PAIRS[path] = emoe.load(path, embeddings="disk")[0], emoe.load(path)[0]
    return _PAIRS[path]


def test_rows_are_converted_as_transformers_converts_the_whole_table(path: Path) -> None:
    """A float32 checkpoint that runs in bfloat16."""
    model, _ = emoe.load(path, embeddings="disk", dtype=torch.bfloat16)
    plain, _ = emoe.load(path, dtype=torch.bfloat16)
    assert table_of(model).lookup.entry.dtype == "F32"
    every = torch.arange(128).view(2, 64)
    assert torch.equal(model.get_input_embeddings()(every), plain.get_input_embeddings()(every))
    assert table_of(model).bytes_read == 2 * plain.get_input_embeddings().weight.nbytes


def test_auto_is_on_disk_where_experts_are(path: Path) -> None:
    partly, whole = emoe.load(path, expert_memory="60%", embeddings="auto")[0], emoe.load(path, embeddings="auto")[0]
    assert emoe.stats(partly)["embeddings"]["place"] == "disk"
    assert emoe.stats(whole)["embeddings"] == {
        "place": "memory",
        "reason": "every expert is resident",
        "bytes_spared": 0,
        "rows_read": 0,
        "bytes_read": 0,
    }
    text = partly.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False)
    assert torch.equal(text, whole.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False))
    assert emoe.stats(partly)["embeddings"]["rows_read"] == 3 + 4


def test_the_table_is_never_read_or_allocated_whole(path: Path) -> None:
    model, _ = emoe.load(path, embeddings="disk")
    assert model.get_input_embeddings().weight.device.type == "meta"
    assert "weight" not in dict(model.get_input_embeddings().named_parameters())
    assert table_of(model).rows_read == 0


def test_faults_have_the_readers_errors(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path, seed=2)
    model, _ = emoe.load(folder, embeddings="disk")
    table = table_of(model)
    for wrong in (-1, 128):
        with pytest.raises(IndexError, match=f"token id {wrong} is no row of the embedding, which has 128"):
            model(input_ids=torch.tensor([[1, wrong]]))
    entry = table.lookup.entry
    os.truncate(entry.file, entry.offset + 3 * entry.nbytes // 128)
    with pytest.raises(ReadError, match="has changed since it was indexed"):  # also of a row that is still there
        table.rows(torch.tensor([2]))
    with pytest.raises(ReadError, match=r"ends early|has changed"):
        model(input_ids=torch.tensor([[1, 5]]))
    with pytest.raises(UsageError, match=r"cannot be resized: load the model with embeddings='memory'"):
        model.resize_token_embeddings(200)


def test_choices_are_checked(path: Path) -> None:
    with pytest.raises(UsageError, match="embeddings='ram' is no choice: use one of memory, disk, auto"):
        emoe.load(path, embeddings="ram")  # type: ignore[arg-type]
    _, empty = skeleton(path)
    index = build_index(path, empty)
    assert index.lookup is not None
    assert choose_embeddings("disk", index, True) == (index.lookup, "as asked")
    assert choose_embeddings("memory", index, False) == (None, "as asked")
    empty.get_input_embeddings().max_norm = 1.0  # rows would be changed when they are looked up
    assert find_lookup(empty, {}, lambda *_: torch.float32) is None
