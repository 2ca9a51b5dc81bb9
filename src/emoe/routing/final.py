"""Families whose last decoder layer ends row by row, so that of a prompt only the tokens with logits need its experts.

Nothing may come after its experts that looks at other tokens: no convolution as Inkling 2 has it, no state that the
next token's pass reads. A family that is not named here runs every token in its last layer: slower, never wrong.
"""

from __future__ import annotations

# Each is run by tests/model/test_final.py with what it leaves out made NaN.
_ROW_BY_ROW = frozenset(
    [
        "afmoe",
        "aria",
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5_moe",
        "exaone_moe",
        "flex_olmo",
        "gemma4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt_oss",
        "granitemoe",
        "granitemoeshared",
        "hunyuan_v1_moe",
        "hy_v3",
        "jamba",
        "laguna",
        "lfm2_moe",
        "mimo_v2_flash",
        "minimax",
        "minimax_m2",
        "mixtral",
        "nemotron_h",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_5_moe",
        "qwen3_moe",
        "qwen3_next",
        "solar_open",
    ]
)


def ends_row_by_row(model_type: str) -> bool:
    """Whether that is known of a configuration's `model_type`, its text part's or the whole's."""
    return model_type.removesuffix("_text") in _ROW_BY_ROW
