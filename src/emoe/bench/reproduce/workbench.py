"""What all experiments share: one model, prompts to learn from and prompts to score, routes, a profile, kept cells.

Everything costly is kept in OUT/work as soon as it is made, so a run that was stopped goes on, and experiments share
what they have in common. OUT/work/job.json says what a run is of; another run needs another folder.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

import emoe
from emoe import nano
from emoe.bench.plant.card import CARD
from emoe.bench.plant.card import LABEL as CARD_LABEL
from emoe.bench.reproduce.asked import PAPER_SHARE, Settings, Side, other_routes, two_sides
from emoe.bench.reproduce.keeping import Cells, Step, file_digest, routes_digest
from emoe.checkpoint.fingerprint import fingerprint
from emoe.checkpoint.source import resolve
from emoe.config import format_bytes
from emoe.errors import BudgetError, UsageError
from emoe.model import close
from emoe.model.encoding import encode
from emoe.planner import Plan, facts_of, plan
from emoe.profiling.kept import cores, processor
from emoe.profiling.prompts import digest, tasks_of
from emoe.profiling.record import read_recorded, record
from emoe.profiling.running import Answer
from emoe.routing.trace import Trace
from emoe.tasks.profile import Profile

Say = Callable[[str], None]
T = TypeVar("T")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class Workbench(Cells):
    """Opened once for a run; see the module's text. mark: a hash of what the run is of, another one for every run that
    began anew: a finding with this mark need not be made again. traces: other models' routes by name, or where the
    file holds no more than that, tokens per expert by prompt.

    Raises:
        UsageError: no such model, prompts or traces, or OUT holds a run of something else.
    """

    def __init__(self, settings: Settings, step: Step, say: Say) -> None:
        """Read the prompts, and note what the run is of; the model is loaded when it is first needed."""
        super().__init__(settings.out, step)
        self.settings = settings
        self.say = say
        self.folder = nano.path() if settings.model is None else resolve(settings.model)
        self.name = "emoe-nano" if settings.model is None else Path(settings.model).name
        self.fingerprint = fingerprint(self.folder)
        self.prompts = two_sides(settings)
        self.tasks = tasks_of(self.prompts["score"])
        self.traces = {name: other_routes(path) for name, path in settings.traces}
        self.share = settings.share
        self._recorded: dict[Side, tuple[Trace, list[Answer]]] = {}
        self._ids: dict[Side, list[list[int]]] = {}
        self._plans: dict[str | int | None, Plan] = {}
        self.mark = self.begin(self._job(), self._added())

    def pick(self, quick: T, full: T) -> T:
        """One value for a quick pass, another for a full one."""
        return quick if self.settings.quick else full

    # -- the model -------------------------------------------------------------------------------------------

    @contextmanager
    def model(self, **options: Any) -> Iterator[tuple[PreTrainedModel, Any]]:
        """The model and its tokenizer, loaded as `emoe.load(**options)` does, and closed afterwards.

        Raises:
            UsageError: the checkpoint has no tokenizer.
        """
        self.not_frozen("runs of the model")
        torch.set_num_threads(self.settings.threads)
        gc.collect()  # the model before this one lies in cycles of references, and is as large
        model, tokenizer = emoe.load(self.settings.model, **options)
        try:
            if tokenizer is None:
                raise UsageError(f"{self.folder} has no tokenizer: the experiments ask with text.")
            yield model, tokenizer
        finally:
            close(model)

    def planned(self, experts: str | int | None = None) -> Plan:
        """The planner's sums for the longest prompt and answer here; experts None: as many as fit.

        Made once for a run: what is free changes while it goes on, and what was found to fit must stay so.
        """
        if experts not in self._plans:
            given = self.settings.prompt_tokens
            self._plans[experts] = plan(
                self.folder,
                memory=self.settings.memory,
                expert_memory=experts,
                context=given + self.new_tokens,
                prompt=given,
            )
        return self._plans[experts]

    @cached_property
    def budget(self) -> int | None:
        """Bytes of experts for what may load them as it goes; None where all fit.

        Raises:
            BudgetError: not even the fewest fit.
        """
        made = self.planned()
        if made.fit == "none":
            raise BudgetError(
                f"{self.name} takes at least {format_bytes(made.rest_bytes + made.floor_bytes)}, and this run may use "
                f"{format_bytes(made.memory_bytes or 0)} ({made.memory_source})."
            )
        return None if made.fit == "all" else made.budget_bytes

    @cached_property
    def tokenizer(self) -> Any:
        """The model's.

        Raises:
            UsageError: the checkpoint has none.
        """
        from transformers import AutoTokenizer

        if not any((self.folder / name).exists() for name in TOKENIZER_FILES):
            raise UsageError(f"{self.folder} has no tokenizer: the experiments ask with text. Put its files there.")
        return AutoTokenizer.from_pretrained(self.folder)

    def ids(self, side: Side) -> list[list[int]]:
        """Token ids of every prompt; one longer than `prompt_tokens` loses its middle."""
        if side not in self._ids:
            most = self.settings.prompt_tokens
            found = [encode(self.tokenizer, prompt.messages, name=self.name) for prompt in self.prompts[side]]
            self._ids[side] = [
                ids if len(ids) <= most else ids[: most // 2] + ids[len(ids) - (most - most // 2) :] for ids in found
            ]
        return self._ids[side]

    # -- what was recorded and learned ---------------------------------------------------------------------------

    def recorded(self, side: Side) -> tuple[Trace, list[Answer]]:
        """The full model's greedy answers to the prompts of one side, and all their routes."""
        if side not in self._recorded:
            folder = self.work / "routes" / side
            kept = read_recorded(folder, len(self.prompts[side]))
            if kept is None:
                with self.model(expert_memory=self.budget) as (model, _):
                    kept = record(
                        model,
                        self.prompts[side],
                        self.ids(side),
                        self.new_tokens,
                        folder,
                        lambda done, total: self.step(f"prompts to {side}", done, total),
                    )
            self._recorded[side] = kept
        return self._recorded[side]

    @property
    def new_tokens(self) -> int:
        """Tokens of an answer at most."""
        return self.pick(min(self.settings.new_tokens, 16), self.settings.new_tokens)

    @cached_property
    def profile(self) -> Profile:
        """What `emoe profile` makes of the prompts to learn from."""
        from emoe.profiling.job import make_profile
        from emoe.profiling.settings import ProfileSettings, check_settings

        folder = self.work / "profile"
        if (folder / "profile.json").is_file():
            return Profile.read(folder, self.fingerprint)
        settings = ProfileSettings(
            new_tokens=self.new_tokens,
            sensitivity_prompts=self.pick(2, 8),
            prefixes=self.pick(6, 12),
            predictors=("task-popularity", "static"),
            seed=self.settings.seed,
        )
        with self.model(expert_memory=self.budget) as (model, tokenizer):
            prompts = self.prompts["learn"]
            make_profile(
                model,
                tokenizer,
                prompts,
                check_settings(settings),
                folder,
                name=self.name,
                step=self.step,
                say=self.say,
            )
        return Profile.read(folder, self.fingerprint)

    def trained(self, *names: str) -> Profile:
        """The profile with predictors of these names besides, trained on the routes of the prompts to learn from."""
        from emoe.profiling.training import train
        from emoe.tasks.profile import PredictorStates

        trace, _ = self.recorded("learn")
        states = train(names, trace, self.work / "predictors", self.settings.seed, self.say)
        return dataclasses.replace(self.profile, predictors=PredictorStates({**self.profile.predictors, **states}))

    # -- what the run is of -------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """The machine and the run, for the report."""
        return {
            "model": self.name,
            "quick": self.settings.quick,
            "prompts to learn from": len(self.prompts["learn"]),
            "prompts scored": len(self.prompts["score"]),
            "tokens of an answer": self.new_tokens,
            "seed": self.settings.seed,
            "machine": f"{processor()}, {cores()} cores, {_memory_gib():.0f} GiB, {platform.system()}",
            "threads": self.settings.threads,
            **({} if self.share == PAPER_SHARE else {"share of the experts": self.share}),
            **({} if self.weights is None else {"weights": self.weights}),
            "versions": ", ".join(f"{name} {_version(name)}" for name in ("emoe", "torch", "transformers")),
        }

    @cached_property
    def vocabulary(self) -> int:
        """Tokens that the model tells apart."""
        return facts_of(self.folder)[1].activations.vocabulary

    @cached_property
    def weights(self) -> str | None:
        """What a planted checkpoint says of itself; None for a trained one."""
        return CARD_LABEL if (self.folder / CARD).is_file() else None

    def _job(self) -> dict[str, Any]:
        """What a run that goes on must have in common with what is kept."""
        plain = dataclasses.asdict(self.settings)
        kept = {name: plain[name] for name in ("quick", "seed", "prompt_tokens", "new_tokens", "threads")}
        return {
            "model": self.fingerprint,
            "prompts": {side: digest(prompts) for side, prompts in self.prompts.items()},
            **kept,
            **({} if self.share == PAPER_SHARE else {"share": self.share}),
        }

    def _added(self) -> dict[str, Any]:
        """What may be added to a run."""
        return {
            "traces": {name: routes_digest(routes) for name, routes in self.traces.items()},
            "arrivals": None if self.settings.arrivals is None else file_digest(self.settings.arrivals),
            **({} if self.settings.memory is None else {"memory": str(self.settings.memory)}),
        }


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _version(name: str) -> str:
    if name == "emoe":
        return emoe.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
