"""The index against transformers' own loading: for every family and layout, each expert's very bytes."""

from __future__ import annotations

import gc
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from emoe.checkpoint.index import ExpertIndex, LayerIndex, build_index, skeleton
from emoe.checkpoint.readers import Reader
from emoe.errors import CheckpointError
from tests.conftest import Checkpoints
from tests.families import FAMILIES


def open_index(path: Path, dtype: Any = "auto") -> ExpertIndex:
    return build_index(path, skeleton(path, dtype=dtype)[1])


def empty_parts(layer: LayerIndex) -> dict[str, torch.Tensor]:
    """A slot's parts, filled with what no checkpoint holds."""
    return {part.name: torch.full(part.shape, float("nan"), dtype=getattr(torch, part.dtype)) for part in layer.parts}


def assert_experts_equal(index: ExpertIndex, model: PreTrainedModel) -> None:
    """Every expert read by emoe is bit for bit what transformers loaded, in the same dtype."""
    loaded = dict(model.named_parameters())
    with Reader("cached", index.files) as reader:
        for layer in index.layers:
            for expert in range(layer.num_experts):
                parts = empty_parts(layer)
                pieces = layer.pieces(expert)
                assert reader.read_into(pieces, parts) == index.stored_nbytes(layer.layer, expert)
                for name, part in parts.items():
                    expected = loaded[f"{layer.module}.{name}"][expert]
                    assert part.dtype == expected.dtype
                    assert torch.equal(part.view(torch.uint8), expected.contiguous().view(torch.uint8)), (
                        f"layer {layer.layer} expert {expert} {name}"
                    )


@pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_expert_is_what_transformers_loads(name: str, fused: bool, checkpoints: Checkpoints) -> None:
    path = checkpoints(name, fused=fused)
    index = open_index(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert_experts_equal(index, model)

    saved = model.state_dict(keep_vars=True)
    unique = {id(tensor): tensor for tensor in saved.values()}.values()
    total = sum(tensor.nbytes for tensor in unique)
    assert index.dense_nbytes + index.total_expert_nbytes == total
    assert index.expert_param_names < saved.keys()
    assert sum(saved[param].nbytes for param in index.expert_param_names) == index.total_expert_nbytes
    assert index.total_stored_nbytes == sum(map(index.stored_nbytes, *zip(*index.keys(), strict=True)))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "inkling2_text", "deepseek_v3", "nemotron_h"])
@pytest.mark.parametrize(
    ("stored", "run"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
    ],
    ids=str,
)
def test_conversion_rounds_as_transformers_does(
    name: str, stored: torch.dtype, run: torch.dtype, checkpoints: Checkpoints
) -> None:
    path = checkpoints(name, dtype=stored)
    index = open_index(path, dtype=run)
    assert_experts_equal(index, AutoModelForCausalLM.from_pretrained(path, dtype=run))
    assert {part.dtype for layer in index.layers for part in layer.parts} == {str(run).removeprefix("torch.")}


def test_a_dtype_given_to_build_index_wins(checkpoints: Checkpoints) -> None:
    path = checkpoints("mixtral")
    index = build_index(path, skeleton(path)[1], dtype=torch.float32)
    assert_experts_equal(index, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    assert index.total_expert_nbytes == 2 * index.total_stored_nbytes


def test_sharded_checkpoints_are_the_same(checkpoints: Checkpoints) -> None:
    path = checkpoints("deepseek_v3", max_shard_size="30KB")
    index = open_index(path)
    assert len(index.files) > 3
    assert_experts_equal(index, AutoModelForCausalLM.from_pretrained(path, dtype="auto"))


@pytest.mark.parametrize("experts", [1, 3, 12])
def test_any_number_of_experts(experts: int, checkpoints: Checkpoints) -> None:
    """Twelve experts: 10 and 11 sort after 9, not after 1."""
    path = checkpoints("mixtral", num_local_experts=experts, num_experts_per_tok=1, num_hidden_layers=2)
    assert_experts_equal(open_index(path), AutoModelForCausalLM.from_pretrained(path, dtype="auto"))


def test_names_with_padded_numbers(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Sorted as numbers, as transformers does, also where only some are padded."""
    path = Path(shutil.copytree(checkpoints("mixtral", num_hidden_layers=1), tmp_path / "padded"))
    tensors = load_file(path / "model.safetensors")
    renamed = {re.sub(r"experts\.([137])\.", r"experts.0\1.", name): tensor for name, tensor in tensors.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    assert_experts_equal(open_index(path), AutoModelForCausalLM.from_pretrained(path, dtype="auto"))


def test_a_checkpoint_of_the_model_without_its_head(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Its names lack the prefix "model."; with tied embeddings nothing is missing."""
    whole = AutoModelForCausalLM.from_pretrained(checkpoints("qwen3_moe", tie_word_embeddings=True), dtype="auto")
    whole.model.save_pretrained(tmp_path)
    index = open_index(tmp_path)
    assert "layers.0.mlp.experts.0.gate_proj.weight" in index.expert_tensor_names
    assert_experts_equal(index, whole)


def test_more_than_ten_layers(checkpoints: Checkpoints) -> None:
    path = checkpoints("qwen3_moe", num_hidden_layers=12)
    index = open_index(path)
    assert [layer.layer for layer in index.layers] == list(range(12))
    assert_experts_equal(index, AutoModelForCausalLM.from_pretrained(path, dtype="auto"))


def test_dense_layers_have_no_experts(checkpoints: Checkpoints) -> None:
    index = open_index(checkpoints("deepseek_v3"))
    assert [layer.layer for layer in index.layers] == [1, 2]
    assert index.keys() == [(layer, expert) for layer in (1, 2) for expert in range(8)]
    with pytest.raises(KeyError):
        index.layer(0)


def test_what_the_index_says_about_an_expert(checkpoints: Checkpoints) -> None:
    index = open_index(checkpoints("mixtral"))
    layer = index.layer(1)
    assert layer.module == "model.layers.1.mlp.experts"
    assert [(part.name, part.shape, part.dtype) for part in layer.parts] == [
        ("gate_up_proj", (48, 32), "bfloat16"),
        ("down_proj", (32, 24), "bfloat16"),
    ]
    assert index.expert_nbytes(1) == 2 * (48 * 32 + 32 * 24) == index.stored_nbytes(1, 3)
    pieces = index.pieces(1, 3)
    assert [piece.entry_name for piece in pieces] == [
        f"model.layers.1.block_sparse_moe.experts.3.w{number}.weight" for number in (1, 3, 2)
    ]
    assert [(piece.part, piece.dst_index, piece.nbytes) for piece in pieces] == [
        ("gate_up_proj", (slice(0, 24), slice(0, 32)), 24 * 32 * 2),
        ("gate_up_proj", (slice(24, 48), slice(0, 32)), 24 * 32 * 2),
        ("down_proj", (slice(0, 32), slice(0, 24)), 32 * 24 * 2),
    ]
    assert all(piece.direct for piece in pieces)
    assert {name for name in index.expert_tensor_names if ".1." in name} >= {piece.entry_name for piece in pieces}


def test_interleaved_rows_share_one_read(checkpoints: Checkpoints) -> None:
    index = open_index(checkpoints("inkling2_text"))
    gate, up, down = index.pieces(0, 2)
    assert (gate.file, gate.offset, gate.nbytes) == (up.file, up.offset, up.nbytes)
    assert (gate.src_offset, up.src_offset, gate.src_strides) == (0, 32, (64, 1))
    assert not gate.direct and not up.direct and down.direct
    assert index.stored_nbytes(0, 2) == index.expert_nbytes(0)


def test_tied_weights_count_once(checkpoints: Checkpoints) -> None:
    tied = open_index(checkpoints("qwen3_moe", tie_word_embeddings=True))
    untied = open_index(checkpoints("qwen3_moe"))
    assert untied.dense_nbytes - tied.dense_nbytes == 128 * 32 * 2


def test_either_of_two_tied_weights_may_be_stored(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoints("qwen3_moe", tie_word_embeddings=True), tmp_path / "tied"))
    tensors = load_file(path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert_experts_equal(open_index(path), AutoModelForCausalLM.from_pretrained(path, dtype="auto"))
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's dense tensors: model\.embed_tokens\.weight"):
        open_index(path)


def test_tensors_the_model_has_no_place_for_are_left_alone(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """DeepSeek-V3 and GLM checkpoints carry one layer more, for multi-token prediction."""
    longer = checkpoints("deepseek_v3", num_hidden_layers=4)
    config = checkpoints("deepseek_v3", num_hidden_layers=3) / "config.json"
    for file in longer.iterdir():
        (tmp_path / file.name).write_bytes((config if file.name == "config.json" else file).read_bytes())
    index = open_index(tmp_path)
    assert [layer.layer for layer in index.layers] == [1, 2]
    assert not any(".layers.3." in name for name in index.expert_tensor_names)


def test_indexing_touches_no_weight(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only headers are read: a file whose data is all hole gives the same index."""
    path = checkpoints("olmoe")
    before = open_index(path)
    file = path / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    kept = file.read_bytes()
    try:
        file.write_bytes(kept[:header])
        with file.open("r+b") as stream:
            stream.truncate(len(kept))
        after = open_index(path)
    finally:
        file.write_bytes(kept)
    keys = before.keys()
    assert after.keys() == keys
    assert [after.pieces(*key) for key in keys] == [before.pieces(*key) for key in keys]


def test_a_hundred_gigabytes_are_indexed_fast(tmp_path: Path) -> None:
    """Headers of 94 layers x 128 experts x 3 tensors, in 30 sparse files: 36,096 tensors."""
    from tests.checkpoint.sparse import write_sparse_qwen3_moe

    total = write_sparse_qwen3_moe(tmp_path, layers=94, experts=128, hidden=2048, width=768, shards=30)
    assert total > 100e9
    skeleton(tmp_path)  # imports the family's code
    started = time.thread_time()
    index = open_index(tmp_path)
    elapsed = time.thread_time() - started
    assert len(index.keys()) == 94 * 128
    assert index.total_expert_nbytes == 94 * 128 * 3 * 2048 * 768 * 2
    # Processor time, so that a busy machine does not fail it; 0.4 s where the bound was set.
    assert gc.isenabled()
    assert elapsed < 2.0
