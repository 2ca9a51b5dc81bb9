"""What the engine does not do, found out from a model's configuration alone: before anything, torch too, is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from emoe.checkpoint.settings import read_config
from emoe.errors import UnsupportedModelError, UsageError
from emoe.planner.facts import Facts
from emoe.planner.remote import remote_settings

GENERATION = "generation_config.json"

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "guidance_scale": (None, 1, 1.0),
    "penalty_alpha": (None, 0, 0.0),
    "sequence_bias": (None,),
    "bad_words_ids": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "begin_suppress_tokens": (None,),
    "watermarking_config": (None,),
    "stop_strings": (None,),
}
"""Settings that would change the text and that the engine does not know, with the values at which they do not."""


def refuse_generation(setting: Callable[[str], Any]) -> None:
    """Refuse a generation configuration; `setting` gives the value of one of its names, None where it has none.

    Raises:
        UsageError: it asks for something that would change the text and that the engine does not do.
    """
    for name, neutral in _NEUTRAL.items():
        value = setting(name)
        if value not in neutral:
            raise UsageError(
                f"the model's generation configuration sets {name}={value!r}, which continuous batching does not "
                f"do, so the text would differ from generate()'s. Set model.generation_config.{name} = None, or "
                "take it out of generation_config.json (or config.json), to serve the model without."
            )


def generation_settings(model: str | None, facts: Facts, revision: str | None = None) -> dict[str, Any]:
    """What a checkpoint says of generation: generation_config.json, else what of it stands in config.json.

    Of a hub `model` that is not here only generation_config.json is fetched: what stands in config.json is refused when
    the engine starts.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not facts.path.is_dir():
        return {} if model is None else remote_settings(model, GENERATION, revision)
    if (facts.path / GENERATION).is_file():
        return read_config(facts.path, GENERATION)
    config = read_config(facts.path)
    inner = config.get("text_config")
    return {**(inner if isinstance(inner, dict) else {}), **config}


def refuse_attention(model: str, facts: Facts) -> None:
    """Refuse a model whose layers the paged cache cannot hold.

    Raises:
        UnsupportedModelError: it says why, and what to do.
    """
    if facts.not_paged:
        raise UnsupportedModelError(
            f"{model} cannot be batched continuously: {facts.not_paged}, which transformers' paged cache does not "
            "hold. Use generate() (`emoe generate`, `emoe chat`)."
        )
