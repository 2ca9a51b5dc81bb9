"""What a decode benchmark is asked to do, and the contenders that follow from it. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Literal

from emoe.checkpoint.codecs.formats import NATIVE, codec_of
from emoe.config import PREFETCHES, Embeddings, ExpertMemory, Mode, Prefetch
from emoe.errors import UsageError
from emoe.policies.foresight import Foresight

Engine = Literal["emoe", "transformers", "accelerate", "airllm"]

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
"""transformers' experts implementations that run on every device."""

DISK_OFFLOAD = "accelerate-disk"
BASELINES = (*IMPLEMENTATIONS, DISK_OFFLOAD)

NO_PREFETCH = "none"
"""Among prefetches: the contender that loads nothing ahead."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One configuration, measured in a process of its own."""

    engine: Engine
    expert_memory: ExpertMemory | None = None
    mode: Mode | None = None
    implementation: str | None = None
    eviction: str | None = None
    prefetch: Prefetch | None = None

    @property
    def name(self) -> str:
        """What tables call it: "emoe exact 40%", "emoe exact 40% next-use next-gate", "transformers grouped_mm"."""
        if self.engine == "transformers":
            return f"transformers {self.implementation}"
        if self.engine == "airllm":
            return "airllm"
        how = "disk" if self.engine == "accelerate" else self.mode
        chosen = "".join(f" {word}" for word in (self.eviction, self.prefetch) if word is not None)
        return f"{self.engine} {how} {'100%' if self.expert_memory is None else self.expert_memory}{chosen}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back."""
        memory = None if self.expert_memory is None else str(self.expert_memory)
        return {
            "engine": self.engine,
            "expert_memory": memory,
            "mode": self.mode,
            "implementation": self.implementation,
            "eviction": self.eviction,
            "prefetch": self.prefetch,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Contender:
        """The opposite of `as_dict`."""
        memory = values["expert_memory"]
        return cls(**{**values, "expert_memory": None if memory is None else ExpertMemory.parse(memory)})


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings:
    """One run of `emoe bench decode`.

    `model` None is emoe-nano. `threads` None leaves torch's own number. `memory_limit` bytes: each process runs in a
    memory cgroup of that size. `cold`: the checkpoint's pages are dropped from the page cache before each measured
    generation. `forced`: the checkpoint is a planted one, and the tokens of its trace are fed whatever the logits say,
    `batch` sequences at once, prompts in passes of `chunk` tokens (None: in one); `new_tokens` counts the logits read,
    one more than the steps after the prompt.
    `expert_dtype`, `expert_cache`, `predictor`, `embeddings` as `emoe.load` has them. Each of `evictions` with each of
    `prefetches` is a contender (none: the default of `emoe.load`; `NO_PREFETCH` loads nothing ahead); `history` is a
    trace of other prompts, from which those that learn do so beforehand. `baseline` names the contender that ratios
    refer to; None takes the fastest of transformers' implementations at what is compared, or emoe with every expert
    where none of those ran.
    """

    model: str | None = None
    budgets: tuple[ExpertMemory, ...] = tuple(ExpertMemory("share", s) for s in (1.0, 0.6, 0.4, 0.2))
    modes: tuple[Mode, ...] = ("exact", "resident")
    baselines: tuple[str, ...] = BASELINES
    prompt_tokens: int = 128
    new_tokens: int = 32
    rounds: int = 5
    warmups: int = 1
    threads: int | None = None
    memory_limit: int | None = None
    cold: bool = False
    reader: str = "auto"
    evictions: tuple[str, ...] = ()
    history: str | None = None
    baseline: str | None = None
    offload_folder: str | None = None
    seed: int = 0
    one_at_a_time: bool = False
    forced: bool = False
    batch: int = 1
    chunk: int | None = None
    expert_dtype: str = NATIVE
    expert_cache: str | None = None
    predictor: str | None = None
    prefetches: tuple[str, ...] = ()
    embeddings: Embeddings = "memory"
    contenders: tuple[Contender, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Check the numbers and derive the contenders. Raises UsageError."""
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("rounds", 1), ("warmups", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name.replace('_', ' ')} must be at least {least}, not {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, not {self.threads}")
        if self.chunk is not None and self.chunk < 1:
            raise UsageError(f"chunk must be at least 1, not {self.chunk}")
        if (self.batch > 1 or self.chunk is not None) and not self.forced:
            raise UsageError("batches and chunks can be replayed (emoe bench replay), not generated")
        codec_of(self.expert_dtype)
        ahead = self._prefetches()
        for rule, mode, prefetch in product(self.evictions or (Foresight().eviction,), self.modes, ahead):
            # Refuses a name that nothing has, and settings at odds.
            Foresight(mode=mode, eviction=rule, predictor=self.predictor, prefetch=prefetch, profiled=True)
        made = tuple(_contenders(self.budgets, self.modes, self.baselines, self.evictions, ahead))
        if not made:
            raise UsageError("nothing to measure: give at least one budget and mode, or a baseline")
        names = [contender.name for contender in made]
        if self.baseline is not None and self.baseline not in names:
            raise UsageError(f"no contender is called {self.baseline!r}; there are {', '.join(names)}")
        object.__setattr__(self, "contenders", made)

    def _prefetches(self) -> tuple[Prefetch | None, ...]:
        """What `emoe.load` is given of each contender. Raises UsageError."""
        found: list[Prefetch | None] = []
        for name in self.prefetches:
            known = next((each for each in PREFETCHES if each == name), None)
            if known is None and name != NO_PREFETCH:
                raise UsageError(f"no prefetching is called {name!r}; use {', '.join((NO_PREFETCH, *PREFETCHES))}")
            if known is None and self.predictor is not None:
                raise UsageError(f"a predictor loads ahead: leave it out, or prefetching {NO_PREFETCH!r}")
            found.append(known)
        return tuple(found) or (None,)

    @property
    def positions(self) -> int:
        """Tokens of one sequence that pass through the model: the last new one is read off and not fed."""
        return self.prompt_tokens + self.new_tokens - self.forced

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(self)
        values["budgets"] = [str(budget) for budget in self.budgets]
        values["contenders"] = [contender.name for contender in self.contenders]
        return values


def parse_budget(text: str) -> ExpertMemory:
    """A budget of `--budgets`: expert memory as everywhere, or a bare number of percent ("40")."""
    text = text.strip()
    return ExpertMemory.parse(f"{text}%" if text.replace(".", "", 1).isdigit() else text)


def _contenders(
    budgets: Sequence[ExpertMemory],
    modes: Sequence[Mode],
    baselines: Sequence[str],
    evictions: Sequence[str],
    prefetches: Sequence[Prefetch | None],
) -> list[Contender]:
    """Every mode, rule and prefetching at every budget, then the baselines. With every expert resident they do the
    same: one is run."""
    made: list[Contender] = []
    for budget in budgets:
        everything = budget.kind == "share" and budget.value == 1
        if everything:
            made += [Contender("emoe", budget, mode) for mode in modes[:1]]
            continue
        for mode, rule, prefetch in product(modes, evictions or (None,), prefetches):
            made.append(Contender("emoe", budget, mode, eviction=rule, prefetch=prefetch))
    offloads = [budget for budget in budgets if not (budget.kind == "share" and budget.value == 1)]
    for baseline in baselines:
        name, _, asked = baseline.partition(":")
        if name == DISK_OFFLOAD:
            # Slow, so at one budget unless others are asked for by name.
            budget = parse_budget(asked) if asked else _usual(offloads)
            made.append(Contender("accelerate", budget))
        elif asked:
            raise UsageError(f"{baseline!r}: only {DISK_OFFLOAD} takes a budget, like {DISK_OFFLOAD}:40%")
        else:
            made.append(Contender("transformers", implementation=name))
    return list(dict.fromkeys(made))


def _usual(budgets: Sequence[ExpertMemory]) -> ExpertMemory:
    """40 % where it is among the budgets or there is none, else the first of them."""
    usual = ExpertMemory("share", 0.4)
    return usual if usual in budgets or not budgets else budgets[0]
