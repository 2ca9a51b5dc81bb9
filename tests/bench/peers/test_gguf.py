"""GGUF files: every weight of the checkpoint is where llama.cpp looks for it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from emoe.bench.peers import gguf_file
from emoe.bench.peers.gguf_file import cached_gguf, gguf_package, write_gguf
from emoe.bench.peers.gguf_layout import LAYOUTS, GgufTensor, layout_of, read_rows
from emoe.checkpoint.headers import read_headers
from emoe.errors import CheckpointError, UnsupportedModelError, UsageError
from tests.bench.peers.checkpoints import EXPERTS, FAMILIES, HIDDEN, INNER, LAYERS, VOCABULARY, save

WITH_GGUF = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf: pip install emoe[peers]")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    folder = tmp_path_factory.mktemp("families")
    return {family: (folder / family, save(family, folder / family, torch.bfloat16)) for family in FAMILIES}


def laid_out(folder: Path) -> dict[str, GgufTensor]:
    config = AutoConfig.from_pretrained(folder)
    return {tensor.name: tensor for tensor in layout_of(config).tensors(read_headers(folder), config)}


def value(tensor: GgufTensor) -> torch.Tensor:
    return torch.cat([block.reshape(-1) for block in tensor.blocks()]).view(tensor.shape)


def experts_of(model: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate, up and down [experts, outputs, inputs] as the loaded model has them, whatever its files look like."""
    layers = model.model.layers[layer]
    experts = layers.mlp.experts
    both, down = experts.gate_up_proj, experts.down_proj
    if model.config.model_type == "gpt_oss":
        return both[..., ::2].transpose(1, 2), both[..., 1::2].transpose(1, 2), down.transpose(1, 2)
    return both[:, :INNER], both[:, INNER:], down


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_those_of_the_loaded_model(models: dict[str, tuple[Path, Any]], family: str) -> None:
    folder, model = models[family]
    tensors = laid_out(folder)
    for layer in range(LAYERS):
        for part, wanted in zip(("gate", "up", "down"), experts_of(model, layer), strict=True):
            found = tensors[f"blk.{layer}.ffn_{part}_exps.weight"]
            assert found.role == "expert"
            assert (
                found.shape
                == tuple(wanted.shape)
                == (EXPERTS, *((HIDDEN, INNER) if part == "down" else (INNER, HIDDEN)))
            )
            assert torch.equal(value(found), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_written_once(models: dict[str, tuple[Path, Any]], family: str) -> None:
    folder, model = models[family]
    written = sum(value(tensor).numel() for tensor in laid_out(folder).values())
    assert written == sum(parameter.numel() for parameter in model.parameters())
    routers = [tensor for name, tensor in laid_out(folder).items() if "ffn_gate_inp" in name or "norm" in name]
    assert routers
    assert {tensor.role for tensor in routers} == {"exact"}


def test_biases_and_sinks_of_gpt_oss(models: dict[str, tuple[Path, Any]]) -> None:
    folder, model = models["gpt_oss"]
    tensors = laid_out(folder)
    layer = model.model.layers[1]
    assert torch.equal(value(tensors["blk.1.ffn_gate_exps.bias"]), layer.mlp.experts.gate_up_proj_bias[:, ::2])
    assert torch.equal(value(tensors["blk.1.ffn_up_exps.bias"]), layer.mlp.experts.gate_up_proj_bias[:, 1::2])
    assert torch.equal(value(tensors["blk.1.ffn_down_exps.bias"]), layer.mlp.experts.down_proj_bias)
    assert torch.equal(value(tensors["blk.1.attn_sinks.weight"]), layer.self_attn.sinks)
    assert torch.equal(value(tensors["blk.1.attn_q.bias"]), layer.self_attn.q_proj.bias)
    assert torch.equal(value(tensors["blk.1.ffn_gate_inp.bias"]), layer.mlp.router.bias)


def test_mixtral_turns_neighbours_where_transformers_turns_halves(models: dict[str, tuple[Path, Any]]) -> None:
    folder, model = models["mixtral"]
    tensors, attention = laid_out(folder), model.model.layers[0].self_attn
    head = HIDDEN // 4
    for short, heads in (("q", 4), ("k", 2)):
        rows = getattr(attention, f"{short}_proj").weight.view(heads, head, HIDDEN)
        found = value(tensors[f"blk.0.attn_{short}.weight"]).view(heads, head, HIDDEN)
        for pair in range(head // 2):
            assert torch.equal(found[:, 2 * pair], rows[:, pair])
            assert torch.equal(found[:, 2 * pair + 1], rows[:, pair + head // 2])
    assert torch.equal(value(tensors["blk.0.attn_v.weight"]), attention.v_proj.weight)


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob = True"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("olmoe", {"num_attention_heads": 4, "num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("mixtral", {"sliding_window": 16}, "sliding_window = 16"),
        ("gpt_oss", {"swiglu_limit": 3.0}, "swiglu_limit = 3.0"),
        (
            "olmoe",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type = 'linear'",
        ),
    ],
)
def test_what_llama_cpp_takes_for_granted_is_checked(family: str, change: dict[str, Any], said: str) -> None:
    config_class, _, own = FAMILIES[family]
    with pytest.raises(UnsupportedModelError, match=said):
        layout_of(config_class(**({"num_attention_heads": 4} | own | change)))


def test_other_families_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no GGUF can be written of gpt2; known are olmoe"):
        layout_of(AutoConfig.for_model("gpt2"))
    assert set(LAYOUTS) == set(FAMILIES)


def test_a_tensor_too_few_or_too_many_is_refused(models: dict[str, tuple[Path, Any]]) -> None:
    folder, _ = models["olmoe"]
    config, entries = AutoConfig.from_pretrained(folder), read_headers(folder)
    lost = {name: entry for name, entry in entries.items() if "experts.3.up_proj" not in name}
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.0\.mlp\.experts\.3\.up_proj"):
        list(LAYOUTS["olmoe"].tensors(lost, config))
    extra = entries | {"model.layers.0.odd": next(iter(entries.values()))}
    with pytest.raises(
        CheckpointError, match=r"1 tensors have no place in a GGUF, the first is 'model\.layers\.0\.odd'"
    ):
        list(LAYOUTS["olmoe"].tensors(extra, config))


def test_a_truncated_file_is_noticed(tmp_path: Path) -> None:
    save("olmoe", tmp_path)
    entries = read_headers(tmp_path)
    last = max(entries.values(), key=lambda entry: entry.offset)
    with last.file.open("rb+") as file:
        file.truncate(last.offset + last.nbytes - 1)
    with pytest.raises(CheckpointError, match="ends inside tensor"):
        read_rows(last, 0, last.shape[0])


@WITH_GGUF
@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_reads_back(models: dict[str, tuple[Path, Any]], family: str, tmp_path: Path) -> None:
    folder, model = models[family]
    seen: list[tuple[int, int]] = []
    file = write_gguf(folder, tmp_path / "x.gguf", progress=lambda done, total: seen.append((done, total)))
    assert list(tmp_path.iterdir()) == [file]
    assert seen[-1][0] == seen[-1][1] > 0
    reader = gguf_package().GGUFReader(file)
    wanted = laid_out(folder)
    assert [tensor.name for tensor in reader.tensors] == list(wanted)
    for tensor in reader.tensors:
        assert tuple(map(int, reversed(tensor.shape))) == wanted[tensor.name].shape
        assert tensor.tensor_type.name == ("F32" if wanted[tensor.name].role == "exact" else "BF16")
        dtype = torch.float32 if wanted[tensor.name].role == "exact" else torch.bfloat16
        found = torch.from_numpy(np.array(tensor.data)).view(dtype).reshape(wanted[tensor.name].shape)
        assert torch.equal(found, value(wanted[tensor.name]).to(dtype))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    name = LAYOUTS[family].architecture
    assert fields["general.architecture"] == name
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    assert fields[f"{name}.vocab_size"] == VOCABULARY
    assert fields[f"{name}.expert_count"] == EXPERTS
    assert fields[f"{name}.expert_used_count"] == 2
    assert fields[f"{name}.rope.freq_base"] == pytest.approx(model.config.rope_parameters["rope_theta"])
    if family == "gpt_oss":
        assert fields["gpt-oss.attention.sliding_window"] == 16
        assert fields["gpt-oss.rope.scaling.factor"] == 32.0


@WITH_GGUF
@pytest.mark.parametrize(("precision", "kind", "error"), [("q8_0", "Q8_0", 0.01), ("q4_0", "Q4_0", 0.15)])
def test_only_experts_are_quantised(
    models: dict[str, tuple[Path, Any]], precision: str, kind: str, error: float, tmp_path: Path
) -> None:
    folder, _ = models["qwen3_moe"]
    gguf = gguf_package()
    wanted = laid_out(folder)
    for tensor in gguf.GGUFReader(write_gguf(folder, tmp_path / "x.gguf", precision)).tensors:
        if wanted[tensor.name].role != "expert":
            assert tensor.tensor_type.name in ("F32", "BF16")
            continue
        assert tensor.tensor_type.name == kind
        exact = value(wanted[tensor.name]).float()
        found = torch.from_numpy(gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)).view(exact.shape)
        assert 0 < (found - exact).norm() / exact.norm() < error


@WITH_GGUF
def test_a_cached_file_belongs_to_its_checkpoint(tmp_path: Path) -> None:
    save("olmoe", tmp_path / "a", torch.bfloat16)
    first = cached_gguf(tmp_path / "a", "native", tmp_path / "cache")
    stamp = first.stat().st_mtime_ns
    assert cached_gguf(tmp_path / "a", "native", tmp_path / "cache") == first
    assert first.stat().st_mtime_ns == stamp
    assert cached_gguf(tmp_path / "a", "q8_0", tmp_path / "cache") != first


@WITH_GGUF
def test_rows_must_divide_into_blocks(tmp_path: Path) -> None:
    save("olmoe", tmp_path / "a", intermediate_size=24)
    with pytest.raises(UnsupportedModelError, match=r"ffn_down_exps.* rows of 24.*Q8_0 blocks of 32"):
        write_gguf(tmp_path / "a", tmp_path / "x.gguf", "q8_0")
    assert not (tmp_path / "x.gguf").exists()


@WITH_GGUF
def test_what_fails_midway_leaves_nothing_and_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("olmoe", tmp_path / "a", torch.bfloat16)
    before = write_gguf(tmp_path / "a", tmp_path / "x.gguf").read_bytes()
    data = gguf_file._data

    def cut(gguf: Any, one: Any) -> Any:
        yield from list(data(gguf, one))[:-1]

    monkeypatch.setattr(gguf_file, "_data", cut)
    with pytest.raises(CheckpointError, match=r"0 bytes were made, \d+ announced"):
        write_gguf(tmp_path / "a", tmp_path / "x.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "x.gguf"]
    assert (tmp_path / "x.gguf").read_bytes() == before


def test_mistakes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no GGUF precision is called 'q5'; use native, q8_0, q4_0"):
        write_gguf(tmp_path, tmp_path / "x.gguf", "q5")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe"}))
    with pytest.raises(UsageError, match=r"gguf, which is not installed: pip install \"emoe\[peers\]\""):
        write_gguf(tmp_path, tmp_path / "x.gguf")
