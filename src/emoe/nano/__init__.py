"""emoe-nano: a small Mixture-of-Experts model that really routes, shipped with the package.

`path()` is a standard Hugging Face checkpoint folder (Qwen3-MoE); `training/` in the repository made it.

    >>> from emoe import nano
    >>> sorted({p["task"] for p in nano.prompts()})[:3]
    ['ask', 'classify', 'code']
"""

from __future__ import annotations

import json
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def path() -> Path:
    """The checkpoint folder; `AutoModelForCausalLM.from_pretrained(path())` needs nothing of ours."""
    return _FOLDER / "checkpoint"


def profile_path() -> Path:
    """Its profile (docs/profile.md), which `emoe profile` made from prompts that training saw."""
    return _FOLDER / "profile"


def prompts() -> list[dict[str, str]]:
    """Prompts that training never saw, about eight per task: `task`, `prompt`, `reference`."""
    with (_FOLDER / "prompts.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
