"""config.json and the files of settings beside it, read without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emoe.errors import CheckpointError


def read_config(path: Path, name: str = "config.json") -> dict[str, Any]:
    """config.json, or another file of settings, as a dict. Raises CheckpointError when it is missing or not JSON."""
    file = path / name
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: not a Hugging Face checkpoint directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, not an object; fetch the checkpoint again")
    return config
