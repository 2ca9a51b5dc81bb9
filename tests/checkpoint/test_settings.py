"""Whatever sizes config.json states, planning, inspecting and loading answer, or refuse in words: never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import emoe
from emoe.checkpoint.index import build_index, skeleton
from emoe.checkpoint.settings import check_sizes, origins, read_config
from emoe.errors import CheckpointError, EmoeError, UnsupportedModelError
from emoe.model.bind import layer_needs
from emoe.planner import plan
from tests.conftest import Checkpoints
from tests.families import FAMILIES, make_config


def inspect(path: Path) -> None:
    _, model = skeleton(path)
    layer_needs(build_index(path, model), model)


def load(path: Path) -> None:
    emoe.close(emoe.load(path).model)


COMMANDS: tuple[Callable[[Path], Any], ...] = (plan, inspect, load)


@pytest.fixture(scope="module")
def folders(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies whose config.json tests may change."""
    made = tmp_path_factory.mktemp("settings")
    families = ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe")
    return {name: Path(shutil.copytree(checkpoints(name), made / name)) for name in families}


def changed(folder: Path, known: dict[str, Any], **values: Any) -> Path:
    config = {name: value for name, value in (known | values).items() if value != "missing"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def known(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: json.loads((folder / "config.json").read_text()) for name, folder in folders.items()}


@pytest.mark.parametrize(
    ("family", "values", "said"),
    [
        (
            "mixtral",
            {"num_experts_per_tok": 9},
            "num_experts_per_tok is 9, more than the 8 experts",
        ),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0, and num_local_experts 8"),
        ("mixtral", {"num_local_experts": -1}, "num_local_experts is -1, and must be at least 0"),
        ("mixtral", {"num_local_experts": 6}, "num_local_experts 6"),
        ("mixtral", {"hidden_size": -32}, "hidden_size is -32, and must be at least 1"),
        ("mixtral", {"hidden_size": 64}, "64 is hidden_size 64"),
        ("mixtral", {"hidden_size": "missing"}, "4096 is hidden_size 4096"),
        ("mixtral", {"hidden_size": 32.5}, "hidden_size is 32.5, not a whole number"),
        ("mixtral", {"vocab_size": 0}, "vocab_size is 0, and must be at least 1"),
        ("mixtral", {"vocab_size": 256}, "256 is vocab_size 256"),
        ("mixtral", {"intermediate_size": 25}, "50 is twice intermediate_size 25"),
        ("mixtral", {"intermediate_size": -1}, "intermediate_size is -1, and must be at least 0"),
        (
            "mixtral",
            {"num_key_value_heads": 3},
            "num_key_value_heads is 3, which does not divide",
        ),
        ("mixtral", {"num_attention_heads": 8}, "64 is num_attention_heads 8 times head_dim 8"),
        ("mixtral", {"head_dim": 320}, "640 is num_key_value_heads 2 times head_dim 320"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3, which does not divide the 8 experts of n_routed_experts"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group is 5, more than the 4 of n_group"),
        ("deepseek_v3", {"topk_group": 1}, "topk_group 1 of n_group 4 leaves 2 experts"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(
    family: str, values: dict[str, Any], said: str, folders: dict[str, Path], known: dict[str, dict[str, Any]]
) -> None:
    path = changed(folders[family], known[family], **values)
    for command in COMMANDS:
        with pytest.raises(CheckpointError, match=said) as caught:
            command(path)
        assert "config.json" in str(caught.value)


SIZES = ("size", "head", "expert", "layers", "rank", "group", "top", "window", "dim")
VALUES: st.SearchStrategy[Any] = st.sampled_from([0, -1, 1, 3, 7, 200, None, "missing", "many", 1.5, True, [], [2], {}])


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_configuration_ends_in_a_traceback(
    data: st.DataObject, folders: dict[str, Path], known: dict[str, dict[str, Any]]
) -> None:
    family = data.draw(st.sampled_from(sorted(folders)))
    fields = sorted(name for name in known[family] if any(word in name for word in SIZES))
    values = data.draw(st.dictionaries(st.sampled_from(fields), VALUES, min_size=1, max_size=2))
    path = changed(folders[family], known[family], **values)
    for command in COMMANDS:
        try:
            command(path)
        except EmoeError as error:
            assert str(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_every_family_pass(family: str) -> None:
    check_sizes(make_config(family).to_dict(), Path("config.json"))


def test_sizes_inside_a_text_config_are_checked() -> None:
    with pytest.raises(CheckpointError, match="hidden_size is 0"):
        check_sizes({"text_config": {"hidden_size": 0}}, Path("config.json"))


def test_where_a_size_comes_from() -> None:
    config = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 8, "intermediate_size": 48}
    assert origins(config, 64) == "hidden_size 64"
    assert origins(config, 96) == "twice intermediate_size 48"
    assert origins(config, 128) == "num_attention_heads 8 times head_dim 16"
    assert origins(config | {"head_dim": 8}, 64) == "hidden_size 64 or num_attention_heads 8 times head_dim 8"
    assert origins(config, 5) == ""


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000 + "]" * 100_000])
def test_json_that_python_does_not_read_is_refused(value: str, tmp_path: Path) -> None:
    """Of thousands of digits, or of endless lists."""
    (tmp_path / "config.json").write_text(f'{{"hidden_size": {value}}}')
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        read_config(tmp_path)


DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dense_model_of_a_family_with_experts_is_called_one(command: Callable[[Path], Any], tmp_path: Path) -> None:
    """As the dense models of Granite 4.0 state it."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "shared_intermediate_size": 64}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "mamba_n_heads": 4,
        "layer_types": ["attention"],
    }
    architecture = {"model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(architecture | sizes | heads | DENSE))
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path)).save_pretrained(
        tmp_path
    )
    assert json.loads((tmp_path / "config.json").read_text()).items() >= DENSE.items()
    with pytest.raises(UnsupportedModelError, match="is a dense model") as caught:
        command(tmp_path)
    assert caught.value.exit_code == 4


def test_what_some_models_do_without_may_be_zero() -> None:
    for values in (DENSE, {"head_dim": 0}, {"n_group": 0, "topk_group": 0}, {"num_experts": 8, "n_group": 0}):
        check_sizes({"num_attention_heads": 4, "num_key_value_heads": 2} | values, Path("config.json"))


@pytest.mark.parametrize(
    "values", [{"num_experts_per_tok": 0}, {"n_group": 0}, {"topk_group": 0}, {"head_dim": 0}, DENSE]
)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_zeros_end_in_no_traceback(
    family: str, values: dict[str, Any], folders: dict[str, Path], known: dict[str, dict[str, Any]]
) -> None:
    path = changed(folders[family], known[family], **values)
    for command in COMMANDS:
        with suppress(EmoeError):
            command(path)
