"""Which router class of transformers follows which rule.

transformers' families copy each other's code, so one rule serves many classes. A class is known by its
family's folder and its name, never by resemblance: a router that merely looks alike may differ in one
line. Adding a family is one line here, and one function in `families` where its router is of a new kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from emoe.routing.rules import families as rules
from emoe.routing.rules.families import Rule


@dataclass(frozen=True, slots=True)
class Entry:
    """A rule, the attributes it reads from the router, and the submodule whose output is the logits.

    `logits_from` is empty where the router returns its logits, as nearly all do.
    """

    kind: str
    rule: Rule
    needs: tuple[str, ...]
    logits_from: str = ""


def class_key(module: nn.Module) -> str:
    """`family.Class` for a class of transformers' own models, its full name otherwise."""
    cls = type(module)
    prefix = "transformers.models."
    if cls.__module__.startswith(prefix):
        return f"{cls.__module__[len(prefix) :].split('.')[0]}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__name__}"


ENTRIES: dict[str, Entry] = {}


def _register(kind: str, rule: Rule, classes: str, needs: str = "top_k", logits_from: str = "") -> None:
    for name in classes.split():
        ENTRIES[name] = Entry(kind, rule, tuple(needs.split()), logits_from)


_GROUPED = "top_k num_group topk_group routed_scaling_factor"
_register(
    "softmax, top-k, renormalised",
    partial(rules.softmax, renormalise=True, upcast=True),
    "mixtral.MixtralTopKRouter minimax.MiniMaxTopKRouter",
)
_register(
    "softmax, top-k",
    partial(rules.softmax, renormalise=None),
    "flex_olmo.FlexOlmoTopKRouter mellum.MellumTopKRouter olmoe.OlmoeTopKRouter qwen2_moe.Qwen2MoeTopKRouter"
    " qwen3_moe.Qwen3MoeTopKRouter qwen3_next.Qwen3NextTopKRouter qwen4_exp.Qwen4ExpTextTopKRouter"
    " qwen3_omni_moe.Qwen3OmniMoeThinkerTextTopKRouter qwen3_omni_moe.Qwen3OmniMoeTalkerTextTopKRouter",
    "top_k norm_topk_prob",
)
_register(
    "softmax, top-k, renormalised",
    partial(rules.softmax, renormalise=True),
    "hunyuan_v1_moe.HunYuanMoEV1Gate qwen3_5_moe.Qwen3_5MoeTopKRouter qwen3_vl_moe.Qwen3VLMoeTextTopKRouter",
)
_register("softmax, top-k", partial(rules.softmax, renormalise=False), "jamba.JambaTopKRouter")
_register(
    "softmax, top-k, scaled per expert",
    rules.gemma,
    "gemma4.Gemma4TextRouter diffusion_gemma.DiffusionGemmaTextRouter",
    "config proj per_expert_scale",
    logits_from="proj",
)
_register(
    "softmax, biased top-k",
    rules.ernie,
    "ernie4_5_moe.Ernie4_5_MoeTopKRouter ernie4_5_vl_moe.Ernie4_5_VLMoeMoeTopKRouter",
    "top_k norm_min moe_statics",
)
_register(
    "softmax, groups by best, top-k",
    rules.deepseek_v2,
    "deepseek_v2.DeepseekV2TopkRouter deepseek_ocr2.DeepseekOcr2TextTopkRouter"
    " unlimited_ocr.UnlimitedOcrTextTopkRouter",
    f"{_GROUPED} topk_method",
)
_register(
    "softmax, groups by two best, top-k",
    partial(rules.mistral4, renormalise=None),
    "mistral4.Mistral4TopkRouter",
    f"{_GROUPED} norm_topk_prob",
)
_register(
    "softmax, groups by two best, top-k",
    partial(rules.mistral4, renormalise=True),
    "mistral_large4.MistralLarge4TextTopkRouter",
    _GROUPED,
)
_register("top-k, softmax", rules.topk_softmax, "gpt_oss.GptOssTopKRouter aria.AriaTextTopKRouter")
_register(
    "top-k, softmax",
    partial(rules.topk_softmax, dtype=torch.float),
    "granitemoe.GraniteMoeTopKRouter granitemoe_swa.GraniteMoeSWATopKRouter"
    " granitemoehybrid.GraniteMoeHybridTopKRouter granitemoeshared.GraniteMoeSharedTopKRouter",
)
_register(
    "top-k, softmax",
    partial(rules.topk_softmax, shared_out=True),
    "openai_privacy_filter.OpenAIPrivacyFilterTopKRouter",
)
_register(
    "top-k, softmax or sigmoid",
    rules.cohere2,
    "cohere2_moe.Cohere2MoeTopKRouter",
    "top_k expert_selection_fn norm_topk_prob",
)
_register(
    "sigmoid, bias, groups by two best, top-k",
    rules.deepseek_v3,
    "axk1.AXK1TopkRouter bailing_hybrid.BailingHybridTopkRouter deepseek_v3.DeepseekV3TopkRouter"
    " deepseek_v32.DeepseekV32TopkRouter dots1.Dots1TopkRouter dots3_note.Dots3NoteTextTopkRouter"
    " exaone_moe.ExaoneMoeTopkRouter glm4_moe.Glm4MoeTopkRouter glm4_moe_lite.Glm4MoeLiteTopkRouter"
    " glm4v_moe.Glm4vMoeTextTopkRouter glm5_next.Glm5NextTextTopkRouter glm_moe_dsa.GlmMoeDsaTopkRouter"
    " hy_v4.HYV4TopkRouter kimi_linear.KimiLinearTopkRouter mimo_v2_flash.MiMoV2FlashTopkRouter"
    " nemotron_h.NemotronHTopkRouter solar_open.SolarOpenTopkRouter",
    f"{_GROUPED} norm_topk_prob e_score_correction_bias",
)
_register(
    "sigmoid, bias, groups by two best, top-k",
    partial(rules.deepseek_v3, outside=0.0),
    "axk2.AXK2TopkRouter",
    f"{_GROUPED} norm_topk_prob e_score_correction_bias",
)
_register(
    "sigmoid, bias, groups by two best, top-k",
    rules.beam,
    "beam.BeamTopKRouter",
    "top_k num_group topk_group norm_topk_prob e_score_correction_bias",
)
_register(
    "sigmoid, bias, top-k",
    partial(rules.sigmoid, bias_is_argument=True, epsilon=1e-20, scale="router_scaling_factor"),
    "hy_v3.HYV3TopKRouter dots3_note.Dots3NoteVisionTopKRouter",
    "top_k router_scaling_factor",
)
_register("sigmoid, bias, top-k", partial(rules.sigmoid, bias_is_argument=True), "minimax_m2.MiniMaxM2TopKRouter")
_register(
    "sigmoid, bias, top-k",
    rules.sigmoid,
    "minimax_m3_vl.MiniMaxM3VLTopKRouter",
    "top_k e_score_correction_bias",
)
_register(
    "sigmoid, bias, top-k",
    partial(rules.sigmoid, in_order=True),
    "laguna.LagunaTopKRouter",
    "top_k e_score_correction_bias",
)
_register(
    "sigmoid, bias, top-k",
    partial(
        rules.sigmoid,
        bias="expert_bias",
        bias_is_argument=True,
        epsilon=1e-20,
        scale="route_scale",
        in_order=True,
    ),
    "afmoe.AfmoeTokenChoiceRouter",
    "top_k route_scale",
)
_register(
    "sigmoid, bias, top-k",
    partial(rules.sigmoid, epsilon=1e-15, scale="routed_scaling_factor"),
    "muse_spark.MuseSparkTopkRouter",
    "top_k e_score_correction_bias routed_scaling_factor norm_topk_prob_eps",
)
_register(
    "sigmoid, top-k",
    partial(rules.sigmoid, bias=None, in_order=True, renormalise=None),
    "flint.FlintTopKRouter",
    "top_k norm_topk_prob",
)
_register("sigmoid, bias, top-k", rules.kolibri1, "kolibri1.Kolibri1TopKRouter", "top_k e_score_correction_bias")
_register(
    "sigmoid, bias, top-k",
    rules.lfm2,
    "lfm2_moe.Lfm2MoeTopKRouter",
    "top_k norm_topk_prob use_expert_bias routed_scaling_factor",
)
_register(
    "named score, bias, top-k",
    rules.scored,
    "deepseek_v4.DeepseekV4TopKRouter inkling2.Inkling2TopKRouter",
    "top_k score_fn e_score_correction_bias routed_scaling_factor",
)
_register(
    "table of token ids",
    rules.tabled,
    "deepseek_v4.DeepseekV4HashRouter",
    "score_fn tid2eid routed_scaling_factor",
)
_register("sparsemixer", rules.phimoe, "phimoe.PhimoeTopKRouter", "top_k router_jitter_noise")
_register(
    "sigmoid beside shared experts",
    rules.inkling,
    "inkling.InklingTopkRouter",
    "top_k weight hidden_dim n_shared_experts route_scale global_scale e_score_correction_bias",
)
_register(
    "softmax with a class for none",
    rules.zaya,
    "zaya.ZayaRouter",
    "top_k num_experts num_router_classes balancing_biases",
)
