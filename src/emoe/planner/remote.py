"""A hub model's configuration and headers, without its weights: range requests fetch only those."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from emoe.checkpoint.headers import TensorEntry
from emoe.checkpoint.source import resolve
from emoe.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_hub_id(text: str) -> bool:
    """Whether `text` is no local path and could name a hub model."""
    return not Path(text).expanduser().exists() and _HUB_ID.fullmatch(text) is not None


def remote_settings(model_id: str, name: str, revision: str | None = None) -> dict[str, Any]:
    """A small JSON file of a hub model; empty where it has none.

    Raises:
        CheckpointError: the hub was not reached, or the file is no JSON object.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        found = json.loads(Path(hf_hub_download(model_id, name, revision=revision)).read_text())
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return {}
        raise CheckpointError(
            f"asking the hub for {name} of {model_id!r} failed: {error}. Check the name and the network, or give the "
            "folder of a downloaded model."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"the hub's {name} of {model_id!r} is no JSON object. Give the folder of a repaired copy."
        )
    return found


def remote_checkpoint(
    model_id: str, revision: str | None = None, token: str | bool | None = None
) -> tuple[Path | None, dict[str, Any], dict[str, TensorEntry]]:
    """The local folder of a hub model that is in the hub's cache, else None and its configuration and
    headers.

    Raises:
        CheckpointError: the hub does not know it, was not reached, or has no safetensors for it.
    """
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        return resolve(model_id, revision=revision, local_files_only=True), {}, {}
    except CheckpointError:
        pass  # not downloaded, or in part: the headers are enough
    try:
        config = json.loads(Path(hf_hub_download(model_id, "config.json", revision=revision, token=token)).read_text())
        metadata = get_safetensors_metadata(model_id, revision=revision, token=token)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise CheckpointError(f"the hub's {model_id!r} has no readable safetensors weights: {error}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"there is no folder {model_id!r}, and asking the hub for its headers failed: {error} Check the "
            "spelling "
            "and the connection, or give a local folder."
        ) from error
    entries = {
        name: TensorEntry(
            Path(file),
            name,
            info.dtype,
            tuple(info.shape),
            info.data_offsets[0],
            info.data_offsets[1] - info.data_offsets[0],
        )
        for file, content in metadata.files_metadata.items()
        for name, info in content.tensors.items()
    }
    return None, config, entries
