"""Which task a prompt belongs to, by profiled keywords (paper, section 2.1).

The paper counts each task's keywords in the prompt and takes the task with most. Here each keyword carries a weight,
its log-odds for the task, and the sums decide. No match and a tie go to the task `OTHER`.

Long prompts are bounded: only the first and the last `edge_chars` characters are looked at. Instructions stand there;
what lies between is the material they are about.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from emoe.errors import UsageError

OTHER = "other"
"""The task of a prompt that no keyword, or more than one task's keywords equally, point to."""

# Chosen by leaving one phrasing out (bench/task_keywords.py --choose): 95.5 % from 150 prompts of each task, 92 to 94 %
# from 10 to 30. A z of 4 with 60 keywords does as well from 150 prompts, but 81 % from 30: few words are that certain.
# 160 keywords reach 95.9 %, but nobody reads that many. 400 characters instead of 160 lose 4 to 9 points.
EDGE_CHARS = 160
KEYWORDS = 100
PRIOR_PROMPTS = 5.0
LEAST_Z = 2.0
LEAST_ODDS = 1.1  # three times as likely as elsewhere: costs nothing, leaves out words that lean to a task only

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


@dataclass(frozen=True, slots=True)
class TaskGuess:
    """What keywords say of a prompt: the task, and the sum of its keywords' weights for each task that had any."""

    task: str
    scores: Mapping[str, float]


class Keywords:
    """Keywords by task, compiled once. As JSON they are two levels of plain objects, to be read and edited."""

    def __init__(self, weights: Mapping[str, Mapping[str, float]], edge_chars: int = EDGE_CHARS) -> None:
        """Take keywords, task -> keyword -> weight. A keyword is one or two lower-case words.

        Raises:
            UsageError: a task called `OTHER`, a keyword that could never match, or a weight that is no positive number.
        """
        if edge_chars < 1:
            raise UsageError(f"edge_chars is {edge_chars}, but at least 1 character must be looked at.")
        self.weights = {task: dict(words) for task, words in weights.items()}
        self.edge_chars = edge_chars
        self.tasks = tuple(self.weights)
        if OTHER in self.weights:
            raise UsageError(f"no task with keywords may be called {OTHER!r}: it is the name for prompts without one.")
        self._single: dict[str, list[tuple[str, float]]] = {}
        self._double: dict[str, dict[str, list[tuple[str, float]]]] = {}
        for task, words in self.weights.items():
            for word, weight in words.items():
                self._add(task, word, weight)

    def _add(self, task: str, keyword: str, weight: float) -> None:
        words = _WORD.findall(keyword)
        if keyword != keyword.lower() or " ".join(words) != keyword or not 1 <= len(words) <= 2:
            raise UsageError(
                f"the keyword {keyword!r} of task {task!r} can never match: write one or two lower-case words."
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise UsageError(
                f"the keyword {keyword!r} of task {task!r} has the weight {weight!r}, not a number above 0."
            )
        if len(words) == 1:
            self._single.setdefault(words[0], []).append((task, float(weight)))
        else:
            self._double.setdefault(words[0], {}).setdefault(words[1], []).append((task, float(weight)))

    def extract(self, prompt: str) -> TaskGuess:
        """Guess the task of a prompt. Each keyword counts once, however often it occurs."""
        scores: dict[str, float] = {}
        for task, weight in self._found(prompt):
            scores[task] = scores.get(task, 0.0) + weight
        if not scores:
            return TaskGuess(OTHER, scores)
        best = max(scores.values())
        # Sums of the same weights in another order differ by rounding: that is a tie, too.
        leaders = [task for task, score in scores.items() if math.isclose(score, best, rel_tol=1e-9)]
        return TaskGuess(leaders[0] if len(leaders) == 1 else OTHER, scores)

    def task_of(self, prompt: str, label: str | None = None) -> str:
        """The caller's own label where there is one, else the guess."""
        return self.extract(prompt).task if label is None else label

    def _found(self, prompt: str) -> Iterator[tuple[str, float]]:
        seen = set()
        for words in word_lists(prompt, self.edge_chars):
            before: dict[str, list[tuple[str, float]]] | None = None
            for word in words:
                if before is not None and word in before:
                    pair = id(before[word])
                    if pair not in seen:
                        seen.add(pair)
                        yield from before[word]
                single = self._single.get(word)
                if single is not None and id(single) not in seen:
                    seen.add(id(single))
                    yield from single
                before = self._double.get(word)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; the inverse of `from_json`."""
        return {"edge_chars": self.edge_chars, "weights": self.weights}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Keywords:
        """Read what `as_json` gave. Raises KeyError, TypeError, AttributeError or UsageError for anything else."""
        return cls(values["weights"], values["edge_chars"])

    @classmethod
    def learn(
        cls,
        prompts: Iterable[tuple[str, str]],
        *,
        edge_chars: int = EDGE_CHARS,
        most: int = KEYWORDS,
        prior_prompts: float = PRIOR_PROMPTS,
        least_z: float = LEAST_Z,
        least_odds: float = LEAST_ODDS,
    ) -> Keywords:
        """Learn from (task, prompt) pairs: log-odds of a word in a task's prompts against all others'.

        Smoothed by a prior of `prior_prompts` prompts that hold each word as often as prompts do on the whole (Monroe,
        Colaresi, Quinn 2008). A task keeps its `most` words of highest z, the log-odds over their standard deviation,
        as far as z is at least `least_z` and the log-odds at least `least_odds`. Pairs labelled `OTHER`
        speak against every task.
        """
        inside: dict[str, Counter[str]] = {}
        sizes: Counter[str] = Counter()
        for task, prompt in prompts:
            sizes[task] += 1
            inside.setdefault(task, Counter()).update(terms(prompt, edge_chars))
        overall: Counter[str] = Counter()
        for counts in inside.values():
            overall.update(counts)
        total = sizes.total()
        weights: dict[str, dict[str, float]] = {}
        for task in sorted(inside.keys() - {OTHER}):
            n, scored = sizes[task], []
            for word, here in inside[task].items():
                share = overall[word] / total
                yes, no = prior_prompts * share, prior_prompts * (1 - share)
                there = overall[word] - here
                odds = math.log((here + yes) / (n - here + no + 0.5))
                odds -= math.log((there + yes) / (total - n - there + no + 0.5))
                z = odds / math.sqrt(1 / (here + yes) + 1 / (there + yes))
                if z >= least_z and odds > max(0.0, least_odds):
                    scored.append((-z, word, odds))
            weights[task] = {word: round(odds, 4) for _, word, odds in sorted(scored)[:most]}
        return cls(weights, edge_chars)


def word_lists(prompt: str, edge_chars: int) -> list[list[str]]:
    """The lower-case words that are looked at: of the whole prompt, or of its two ends."""
    if len(prompt) <= 2 * edge_chars:
        return [_WORD.findall(prompt.lower())]
    return [_WORD.findall(prompt[:edge_chars].lower()), _WORD.findall(prompt[-edge_chars:].lower())]


def terms(prompt: str, edge_chars: int) -> set[str]:
    """The distinct words and pairs of neighbouring words that are looked at."""
    found: set[str] = set()
    for words in word_lists(prompt, edge_chars):
        found.update(words)
        found.update(f"{a} {b}" for a, b in pairwise(words))
    return found


def instruction_of(messages: Iterable[Mapping[str, str]]) -> str:
    """The text of a conversation that tells its task: the last message of the user, else of anybody."""
    text = ""
    users = ""
    for message in messages:
        text = message["content"]
        users = text if message["role"] == "user" else users
    return users or text
