"""Facts from headers, from a dry run and from a model that really ran: the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

import emoe
from emoe.checkpoint.codecs.formats import CODECS, ExpertCodec, coded_parts
from emoe.checkpoint.headers import read_headers
from emoe.checkpoint.index import build_index
from emoe.checkpoint.settings import read_config
from emoe.checkpoint.skeleton import skeleton
from emoe.errors import CheckpointError, UnsupportedModelError, UsageError
from emoe.kernels import combining
from emoe.kernels.choice import VARIABLE
from emoe.planner import activations, facts_of
from emoe.planner.activations import HOLES_BYTES, MASK_NBYTES, activation_bytes, scratch_bytes, why_not_native
from emoe.planner.dry_run import facts_by_dry_run
from emoe.planner.facts import ExpertLayer, Facts, by_size
from emoe.planner.from_headers import facts_from_headers
from emoe.planner.live_bytes import LiveBytes
from emoe.planner.plan import cache_tokens
from emoe.planner.tensors import Unsure
from emoe.planner.widths import MEASURED
from tests.conftest import Checkpoints
from tests.families import FAMILIES, make_checkpoint, make_config

# Families whose caches or names headers alone do not settle. A family that leaves this list is good news.
DRY_RUN_ONLY = {"inkling2_text", "jamba", "minimax", "nemotron_h"}
WIDE: dict[str, Any] = {
    **{"hidden_size": 1024, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 128},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096},
}
LATENT = {"q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
FUSED = ("aria_text", "gpt_oss", "granitemoe", "mixtral", "qwen3_moe")


def from_headers(path: Path, dtype: str | None = None, codec: ExpertCodec | None = None) -> Facts:
    return facts_from_headers(path, read_config(path), read_headers(path), dtype, codec)


def edited(path: Path, to: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with other values in config.json; None removes a key."""
    shutil.copytree(path, to)
    config = json.loads((path / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None or name not in changes}
    (to / "config.json").write_text(json.dumps(kept))
    return to


def tall(family: str) -> dict[str, Any]:
    """Settings of a small model whose heads are together four times as wide as its stream."""
    known, ours = make_config(family).to_dict(), FAMILIES[family].settings
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16 if ours.get("num_key_value_heads") == 4 else 4}
    wanted: dict[str, Any] = {"hidden_size": 256, **heads, "moe_intermediate_size": 32}
    wanted |= {**LATENT, "head_dim": 32, "num_key_value_heads": 16} if "kv_lora_rank" in ours else {}
    wanted = {name: value for name, value in wanted.items() if name in known}
    if "kv_lora_rank" in ours or family == "olmoe":  # these have no width of heads, or one that is not to be chosen
        return wanted
    return wanted | {
        name: 64 for name in ("head_dim", "global_head_dim", "swa_head_dim") if name in {*known, "head_dim"}
    }


@pytest.mark.parametrize(
    ("family", "fused"), [*((name, False) for name in FAMILIES), *((name, True) for name in FUSED)]
)
def test_headers_and_dry_run_agree(family: str, fused: bool, checkpoints: Checkpoints) -> None:
    path = checkpoints(family, fused=fused)
    slow = facts_by_dry_run(path)
    if family in DRY_RUN_ONLY:
        with pytest.raises(Unsure):
            from_headers(path)
        return
    fast = from_headers(path)
    assert fast.expert_layers == slow.expert_layers
    assert (fast.top_k, fast.dtype, fast.max_context) == (slow.top_k, slow.dtype, slow.max_context)
    quick, measured = fast.activations, slow.activations
    assert (quick.hidden, quick.vocabulary, quick.expert_inner) == (
        measured.hidden,
        measured.vocabulary,
        measured.expert_inner,
    )
    for length in (64, 512, 4096):
        bound = length * quick.token_nbytes + length**2 * (quick.pair_nbytes + MASK_NBYTES * quick.masked)
        assert quick.block_nbytes == measured.block_nbytes
        assert measured.token_nbytes * length + measured.pair_nbytes * length**2 <= bound
        assert quick.token_nbytes < 2.2 * measured.token_nbytes
    for context in (1, 5, 40, 200):
        assert fast.cache_bytes(context, 3) == slow.cache_bytes(context, 3)
    assert fast.lookup_bytes == slow.lookup_bytes
    # Routers that a family keeps in float32 are what headers do not tell.
    names = ("gate.weight", "gate.wg.weight", "router", "bias", "gate.e_score", "moe_statics")
    routers = sum(e.nbytes for e in read_headers(path).values() if any(name in e.name for name in names))
    assert abs(fast.dense_bytes - slow.dense_bytes) <= routers


@pytest.mark.parametrize("codec", list(CODECS.values()), ids=list(CODECS))
@pytest.mark.parametrize(
    ("family", "fused"), [*((name, False) for name in FAMILIES), *((name, True) for name in FUSED)]
)
def test_headers_know_what_quantised_experts_take(
    family: str, fused: bool, codec: ExpertCodec, checkpoints: Checkpoints
) -> None:
    known = make_config(family).to_dict()
    widths = {name: 64 for name in ("intermediate_size", "moe_intermediate_size") if name in known}
    path = checkpoints(family, fused=fused, **widths)
    try:
        facts = from_headers(path, codec=codec)
    except Unsure:
        assert family in DRY_RUN_ONLY
        return
    _, empty = skeleton(path)
    index = build_index(path, empty)
    assert facts.expert_layers == tuple(
        ExpertLayer(
            layer.layer,
            layer.num_experts,
            by_size(part.nbytes for part in coded_parts(codec, layer.parts, layer.transposed)),
        )
        for layer in index.layers
    )
    assert facts.native_expert_bytes == index.total_expert_nbytes
    assert facts.expert_dtype == codec.name
    assert facts.activations == from_headers(path).activations


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "lfm2_moe", "jamba", "nemotron_h", "gemma4_text"]
)
def test_the_cache_of_a_model_that_ran_has_the_planned_bytes(family: str, checkpoints: Checkpoints) -> None:
    path = checkpoints(family)
    _, facts = facts_of(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    cache = DynamicCache(config=model.config)
    for step in (40, 1):  # sliding layers cut at the second
        with torch.no_grad():
            cache = model(torch.zeros(2, step, dtype=torch.long), past_key_values=cache).past_key_values
    held = 0
    for layer in cache.layers:
        for value in vars(layer).values():
            tensors = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
            held += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point())
    assert held == facts.cache_bytes(41, 2)


@pytest.mark.parametrize(
    "family", [None, "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "glm4_moe", "gemma4_text", "jamba"]
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_prompt_takes_what_is_planned_and_not_much_less(
    family: str | None, batch: int, kernels: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, kernels)
    path = None if family is None else checkpoints(family)
    _, facts = facts_of(path)
    model, _ = emoe.load(path)
    ids = torch.randint(5, 100, (batch, 240))
    mask = torch.ones_like(ids)
    mask[1:, :7] = 0
    with torch.no_grad(), LiveBytes() as live:
        model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    maths = [bound.math for module in model.modules() if (bound := getattr(module, "_emoe_layer", None)) is not None]
    emoe.close(model)
    if facts.activations.gate_known and kernels == "auto":
        assert all(math.native is None or math.native.whole for math in maths)
    native = not why_not_native(facts)
    assert not (native and kernels == "torch")
    planned = facts.cache_bytes(240, batch) + activation_bytes(facts, 240, batch, native=native)
    if native:  # tensors only
        planned -= scratch_bytes(facts, 240)
    assert live.peak <= planned
    # The C kernels write no scores out for keys and values of unequal size.
    if native or kernels == "torch":
        assert planned < (2.2 if native else 3) * live.peak


@pytest.mark.parametrize("family", sorted(MEASURED))
def test_no_tensor_is_missing_of_a_family_that_is_planned_as_the_c_kernels_read_it(family: str, tmp_path: Path) -> None:
    """At a width where neither the holes of freed memory nor the route could hide what is not counted."""
    if family not in FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    known: dict[str, Any] = make_config(family).to_dict()
    path = make_checkpoint(
        family, tmp_path, dtype=torch.bfloat16, **{name: WIDE[name] for name in WIDE.keys() & known.keys()}
    )
    _, facts = facts_of(path)
    if why := why_not_native(facts):
        pytest.skip(why)
    model, _ = emoe.load(path)
    with torch.no_grad(), LiveBytes() as live:
        model(input_ids=torch.randint(5, 100, (1, 1024)), use_cache=True, logits_to_keep=1)
    emoe.close(model)
    made = activation_bytes(facts, 1024, 1, native=True) - scratch_bytes(facts, 1024)
    tensors = max(made - HOLES_BYTES, -(-made * 4 // 5))
    assert live.peak <= facts.cache_bytes(1024, 1) + tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_wider_than_the_stream_are_counted(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of most large models are; without the experts' workspace, which would hide what is not counted."""
    monkeypatch.setenv(VARIABLE, "torch")
    monkeypatch.setattr(combining, "WORKSPACE_KEPT_BYTES", 0)
    monkeypatch.setattr(activations, "WORKSPACE_KEPT_BYTES", 0)
    path = make_checkpoint(family, tmp_path, dtype=torch.bfloat16, **tall(family))
    _, facts = facts_of(path)
    model, _ = emoe.load(path)
    with torch.no_grad(), LiveBytes() as live:
        model(input_ids=torch.randint(5, 100, (1, 256)), use_cache=True, logits_to_keep=1)
    emoe.close(model)
    planned = facts.cache_bytes(256, 1) + activation_bytes(facts, 256, 1)
    assert live.peak <= 1.001 * planned  # the numbers of positions


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "glm4_moe", "gemma4_text"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_later_pass_over_a_prompt_takes_what_is_planned(
    family: str, batch: int, kernels: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, kernels)
    path = checkpoints(family)
    _, facts = facts_of(path)
    model, _ = emoe.load(path)
    ids = torch.randint(5, 100, (batch, 240))
    with torch.no_grad():
        first = model(input_ids=ids[:, :200], use_cache=True, logits_to_keep=1)
        with LiveBytes() as live:
            model(input_ids=ids[:, 200:], past_key_values=first.past_key_values, use_cache=True, logits_to_keep=1)
    emoe.close(model)
    native = not why_not_native(facts)
    planned = facts.cache_bytes(cache_tokens(240), batch)
    planned += activation_bytes(facts, 40, batch, before=200, native=native)
    if native:
        planned -= scratch_bytes(facts, 240)
    assert live.peak <= planned
    if native or kernels == "torch":
        assert planned < 3 * live.peak


def test_float32_doubles_everything(checkpoints: Checkpoints) -> None:
    path = checkpoints("qwen3_moe")
    half, full = from_headers(path), from_headers(path, "float32")
    assert full.expert_bytes == 2 * half.expert_bytes
    assert full.dense_bytes == 2 * half.dense_bytes
    assert full.cache_bytes(10, 1) == 2 * half.cache_bytes(10, 1)
    assert facts_by_dry_run(path, "float32").expert_bytes == full.expert_bytes


def test_tied_weights_count_once(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = checkpoints("qwen3_moe")
    embedding = read_headers(path)["lm_head.weight"].nbytes
    tied = from_headers(edited(path, tmp_path / "tied", tie_word_embeddings=True))
    assert tied.dense_bytes == from_headers(path).dense_bytes - embedding
    assert "counted once" in tied.assumed[0]


def test_layers_beyond_the_model_are_left_out(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """DeepSeek-V3 and GLM-4.5 ship a layer for multi-token prediction that transformers does not load."""
    path = checkpoints("qwen3_moe")
    fewer = from_headers(edited(path, tmp_path / "fewer", num_hidden_layers=2))
    assert [layer.layer for layer in fewer.expert_layers] == [0, 1]
    assert "does not load" in fewer.assumed[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window": 16, "use_sliding_window": None}, "does not say for which layers"),
        ({"layer_types": ["full_attention", "other", "full_attention"]}, "'other'"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"tie_word_embeddings": None}, "tied"),
        ({"vision_config": {"depth": 1}}, "vision_config"),
        ({"dtype": "float8_e4m3fn"}, "float8"),
        ({"num_hidden_layers": 4}, "3 decoder layers"),
    ],
)
def test_doubts_are_named(changes: dict[str, Any], reason: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = edited(checkpoints("qwen3_moe"), tmp_path / "edited", **changes)
    with pytest.raises(Unsure, match=reason):
        from_headers(path)


def test_a_doubt_leads_to_the_dry_run_and_is_told(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = edited(checkpoints("qwen3_moe"), tmp_path / "edited", tie_word_embeddings=None)
    _, facts = facts_of(path)
    assert facts.source == "dry run"
    assert "whether word embeddings are tied" in facts.assumed[0]


def test_a_quantised_checkpoint_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = edited(
        checkpoints("qwen3_moe"),
        tmp_path / "fp8",
        quantization_config={"quant_method": "fp8", "weight_block_size": None},
    )
    with pytest.raises(UnsupportedModelError, match="quantised"):
        facts_of(path)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8},
        **{"num_attention_heads": 2, "num_key_value_heads": 2},
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="dense model"):
        facts_of(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[]", "not an object")])
def test_a_damaged_config_is_a_checkpoint_error(
    content: str, message: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    path = edited(checkpoints("qwen3_moe"), tmp_path / "damaged")
    (path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        facts_of(path)


def test_missing_folders_and_configs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no directory"):
        facts_of(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        facts_of(tmp_path)
