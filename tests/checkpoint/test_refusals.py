"""What cannot be run is refused before any weight is read, with the tensor, the numbers and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, core_model_loading

from emoe.checkpoint.index import ExpertIndex, build_index, skeleton
from emoe.checkpoint.skeleton import find_experts
from emoe.errors import CheckpointError, EmoeError, UnsupportedModelError, UsageError
from tests.conftest import Checkpoints

GATE = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def single(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A copy of a one-file Mixtral that a test may change."""
    return Path(shutil.copytree(checkpoints("mixtral"), tmp_path / "single"))


def change(path: Path, edit: Callable[[Tensors], Any]) -> Path:
    """Rewrite the weights after `edit` changed them in place."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: tensor})


def change_config(path: Path, **values: Any) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return path


def index(path: Path) -> ExpertIndex:
    return build_index(path, skeleton(path)[1])


def refusal(path: Path, kind: type[EmoeError]) -> str:
    """The text with which indexing `path` is refused."""
    with pytest.raises(kind) as caught:
        index(path)
    return str(caught.value)


def test_a_missing_expert_tensor(single: Path) -> None:
    message = refusal(change(single, lambda t: t.pop(GATE)), CheckpointError)
    assert f"{single} lacks 1 of the tensors" in message
    assert "'model.layers.1.mlp.experts.gate_up_proj' (8 experts)" in message
    assert GATE in message
    assert "Download the checkpoint again" in message


def test_a_missing_expert(single: Path) -> None:
    names = [GATE.replace("w1", f"w{number}") for number in (1, 2, 3)]
    message = refusal(change(single, lambda t: [t.pop(name) for name in names]), CheckpointError)
    assert "lacks 2 of the tensors" in message
    assert names[0] in message and names[2] in message


@pytest.mark.parametrize("kept", [0, 1])
def test_a_missing_projection(single: Path, kept: int) -> None:
    def edit(tensors: Tensors) -> None:
        for expert in range(kept, 8):
            del tensors[GATE.replace(".3.", f".{expert}.")]

    message = refusal(change(single, edit), CheckpointError)
    if kept:
        assert "lacks 7 of the tensors" in message
    else:
        assert "no tensor matches '.experts.*.w1.weight'" in message
        assert "'model.layers.1.mlp.experts.gate_up_proj' [8, 48, 32]" in message


def test_a_layer_without_any_expert(single: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".layers.2.block_sparse_moe.experts." in name]:
            del tensors[name]

    message = refusal(change(single, edit), CheckpointError)
    assert "no tensor makes 'model.layers.2.mlp.experts.gate_up_proj' (layer 2, 8 experts)" in message


def test_one_tensor_of_another_shape(single: Path) -> None:
    message = refusal(change(single, put(GATE, torch.ones(24, 31))), CheckpointError)
    assert f"{single / 'model.safetensors'}: tensor '{GATE}' has shape [24, 31], unlike its neighbours" in message
    assert "needs [8, 48, 32] from 16 tensors" in message


def test_a_configuration_of_another_model(single: Path) -> None:
    message = refusal(change_config(single, intermediate_size=40), CheckpointError)
    assert "has shape [24, 32], like its neighbours" in message
    assert "needs [8, 80, 32]" in message
    assert "they make [8, 48, 32]. By the configuration 80 is twice intermediate_size 40." in message
    assert "Check that config.json belongs to the checkpoint" in message


def test_more_experts_than_the_configuration_has(single: Path) -> None:
    message = refusal(change_config(single, num_local_experts=6), CheckpointError)
    assert "[6, 48, 32]" in message or "[6, 32]" in message


def test_fewer_experts_than_the_configuration_has(single: Path) -> None:
    message = refusal(change_config(single, num_local_experts=9), CheckpointError)
    assert ".experts.8.w1.weight" in message or "[9, 32]" in message


def test_a_fused_tensor_of_another_shape(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoints("gpt_oss"), tmp_path / "copy"))
    name = "model.layers.0.mlp.experts.down_proj_bias"
    message = refusal(change(path, put(name, torch.ones(8, 31))), CheckpointError)
    assert f"tensor '{name}' has shape [8, 31]" in message
    assert "needs [8, 32] from 1 tensors" in message


@pytest.mark.parametrize(
    ("dtype", "kind", "said"),
    [
        (torch.int32, CheckpointError, "has dtype I32"),
        (torch.bool, CheckpointError, "has dtype BOOL"),
        (torch.float8_e4m3fn, UnsupportedModelError, "is quantised (F8_E4M3)"),
        (torch.uint8, UnsupportedModelError, "is quantised (U8)"),
    ],
    ids=str,
)
def test_a_dtype_that_is_no_float(single: Path, dtype: torch.dtype, kind: type[EmoeError], said: str) -> None:
    message = refusal(change(single, lambda t: t.update({GATE: t[GATE].to(dtype)})), kind)
    assert f"expert tensor '{GATE}' {said}" in message


def test_quantised_tensors_under_names_of_their_own(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """gpt-oss as released, its quantization_config lost."""
    path = Path(shutil.copytree(checkpoints("gpt_oss"), tmp_path / "copy"))

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
            tensors[f"{name}_blocks"] = torch.zeros(8, 48, 1, 16, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.zeros(8, 48, 1, dtype=torch.uint8)
            del tensors[name]

    message = refusal(change(path, edit), UnsupportedModelError)
    assert "layer 0's experts are stored quantised" in message
    assert "experts.gate_up_proj_blocks" in message


def test_a_quantised_configuration(single: Path) -> None:
    change_config(single, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(UnsupportedModelError, match=r"is quantised \(fp8\). emoe reads float weights"):
        skeleton(single)


def test_a_missing_dense_tensor(single: Path) -> None:
    message = refusal(change(single, lambda t: t.pop("model.norm.weight")), CheckpointError)
    assert "lacks 1 of the model's dense tensors: model.norm.weight" in message
    assert "random numbers" in message


def test_a_dense_tensor_of_another_shape(single: Path) -> None:
    message = refusal(change(single, put("lm_head.weight", torch.ones(127, 32))), CheckpointError)
    assert "tensor 'lm_head.weight' has shape [127, 32], but the model's 'lm_head.weight' has [128, 32]" in message


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def test_a_dense_model(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", intermediate_size=64, **SMALL)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert "LlamaForCausalLM is a dense model" in refusal(tmp_path, UnsupportedModelError)


def test_experts_outside_the_interface(tmp_path: Path) -> None:
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "intermediate_size_mlp": 64}
    config = AutoConfig.for_model("llama4_text", num_local_experts=4, **SMALL, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    message = refusal(tmp_path, UnsupportedModelError)
    assert "has experts ({'num_local_experts': 4})" in message
    assert "does not use transformers' experts interface" in message


def test_two_sets_of_experts_in_one_layer(single: Path) -> None:
    _, model = skeleton(single)
    layer = model.model.layers[1]
    layer.other_mlp = layer.mlp
    # The same module under two names is one module; a second one is the fault.
    assert len(find_experts(model)) == 3
    with torch.device("meta"):
        layer.other_mlp = type(layer.mlp)(model.config)
    with pytest.raises(UnsupportedModelError, match="two experts modules in layer 1"):
        find_experts(model)


def test_experts_without_a_layer_number(single: Path) -> None:
    _, model = skeleton(single)
    model.lonely = model.model.layers[0].mlp
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UnsupportedModelError, match=r"'lonely\.experts' has no layer number"):
        find_experts(model)


def test_an_operation_that_is_no_rearrangement(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = core_model_loading.Concatenate.convert

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return {name: tensor * 2 for name, tensor in plain(self, *args, **kwargs).items()}

    monkeypatch.setattr(core_model_loading.Concatenate, "convert", scaled)
    message = refusal(single, UnsupportedModelError)
    assert "unsupported layout" in message
    assert "'mul'" in message


def test_a_parameter_made_in_two_ways(single: Path) -> None:
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    message = refusal(change(single, put(fused, torch.ones(8, 48, 32))), UnsupportedModelError)
    assert f"'{fused}' would be made in two ways" in message


@pytest.mark.parametrize("values", [{"model_type": "no_such_family"}, {"hidden_act": "many"}])
def test_a_configuration_transformers_refuses(single: Path, values: dict[str, str]) -> None:
    change_config(single, **values)
    with pytest.raises(UnsupportedModelError, match="transformers cannot build a causal language model from"):
        skeleton(single)


@pytest.mark.parametrize("dtype", ["bf15", "int8"])
def test_a_dtype_models_cannot_run_in(single: Path, dtype: str) -> None:
    with pytest.raises(UsageError, match=f"'{dtype}' is not 'auto' or a floating dtype"):
        skeleton(single, dtype=dtype)


def test_without_a_dtype_in_the_configuration_the_weights_tell(single: Path) -> None:
    change_config(single, dtype=None)
    _, model = skeleton(single)
    assert model.dtype == torch.bfloat16
