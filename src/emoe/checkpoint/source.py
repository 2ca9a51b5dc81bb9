"""Where a checkpoint comes from: a local directory, or a model id of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from emoe.checkpoint.headers import INDEX_FILE, SINGLE_FILE
from emoe.errors import CheckpointError, UnsupportedModelError, UsageError

# What a model needs to run, and no more: repositories also carry original weights, ONNX and GGUF copies.
_PATTERNS = [
    "model*.safetensors",
    INDEX_FILE,
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "*.py",  # looked at only with trust_remote_code
]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def resolve(
    path_or_id: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local directory of the checkpoint `path_or_id`, downloaded first where it is a hub id.

    Only safetensors, configuration and tokenizer files are downloaded, with the hub's own progress bars.

    Raises:
        UsageError: neither a directory nor something the hub could know.
        CheckpointError: the download failed, or the directory has no configuration or no weights.
        UnsupportedModelError: the weights are pickle files only.
    """
    path = Path(path_or_id).expanduser()
    if not str(path_or_id).strip():
        raise UsageError("there is no directory '': give a checkpoint's directory or a hub id such as 'org/name'.")
    if path.is_file():
        raise UsageError(f"{path} is a file. Give the directory that holds config.json and the weights.")
    if path.is_dir():
        directory = path
    elif isinstance(path_or_id, Path) or _looks_like_a_path(path_or_id):
        raise UsageError(f"there is no directory {path}. Give a checkpoint's directory or a hub id such as 'org/name'.")
    else:
        directory = _download(path_or_id, revision, token, local_files_only)
    check_files(directory)
    return directory


def check_files(directory: Path) -> None:
    """Check that `directory` holds a configuration and safetensors weights; the errors are `resolve`'s."""
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json. Give the directory of a transformers checkpoint.")
    if (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file():
        return
    pickles = sorted({file.name for pattern in _PICKLES for file in directory.glob(pattern)})
    if pickles:
        raise UnsupportedModelError(
            f"{directory} has its weights in pickle files only ({', '.join(pickles[:3])}), which can run "
            "code when loaded and cannot be read in parts. Convert them once: "
            "AutoModelForCausalLM.from_pretrained(directory).save_pretrained(new_directory) writes "
            "safetensors."
        )
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    hint = f" It has {', '.join(others[:3])}, which transformers does not load by itself." if others else ""
    raise CheckpointError(
        f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}.{hint} Give a directory that "
        "AutoModelForCausalLM.from_pretrained can load."
    )


def _short(error: Exception) -> str:
    """The first line of what the hub's library says, which goes on with advice of its own, or what the server said."""
    said = getattr(error, "server_message", None) or str(error).strip().partition("\n")[0] or type(error).__name__
    return str(said).rstrip(".:")


def _looks_like_a_path(text: str) -> bool:
    """Whether `text` cannot be a hub id ("name" or "org/name")."""
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/")


def _download(model_id: str, revision: str | None, token: str | bool | None, local_files_only: bool) -> Path:
    """The snapshot directory of a hub model."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                model_id,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=_PATTERNS,
            )
        )
    except HFValidationError as error:
        raise UsageError(
            f"{model_id!r} is neither a local directory nor a hub id such as 'org/name': {_short(error)}"
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"the hub lets only approved accounts download {model_id!r}. Ask for access on its page, then "
            "log in with `hf auth login` or pass token=..."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no directory {model_id!r}, and the hub knows no such model. Check the spelling, or "
            "log in if it is private."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"the hub's {model_id!r} has no revision {revision!r}.") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"there is no directory {model_id!r}, it is not in the hub's local cache, and the hub was not "
            f"asked or not reached ({_short(error)}). Give a local directory, or check the connection."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"downloading {model_id!r} failed: {_short(error)}. Check the connection and the free disk space, then "
            "run again: finished files are kept."
        ) from error
