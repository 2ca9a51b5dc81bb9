"""What is sent: arrivals, each with a task, a label, a prompt and the longest answer it may get."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emoe import nano
from emoe.errors import UsageError
from emoe.scheduling.arrivals import Arrival

USUAL_CHARACTERS = 4.0
"""Characters of a token where a server does not say how many tokens a prompt has."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompts file. `max_tokens` None: the run's."""

    text: str
    task: str | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """One request to send.

    Attributes:
        number: its place among the arrivals.
        at_s: seconds after the first.
        task: what it is.
        label: what the server is told it is; None: nothing.
        prompt: its text.
        max_tokens: the longest answer.
        input_tokens: the length its prompt was fitted to, None: the prompt's own.
    """

    number: int
    at_s: float
    task: str | None
    label: str | None
    prompt: str
    max_tokens: int
    input_tokens: int | None = None


def read_prompts(path: Path | None = None) -> list[Prompt]:
    """Prompts of a JSONL file: `prompt`, and `task` and `max_tokens` where given. Without a path, emoe-nano's.

    Raises:
        UsageError: the file cannot be read, or a line is malformed (named by file and line).
    """
    if path is None:
        return [Prompt(row["prompt"], row["task"]) for row in nano.prompts()]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read prompts from {path}: {error}. It must be UTF-8 text.") from error
    found = [_prompt(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UsageError(f'{path} holds no prompts: it needs a line such as {{"prompt": "What is 2 + 2?"}} for each.')
    return found


def _prompt(where: str, line: str) -> Prompt:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: no JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise UsageError(f'{where}: needs an object with a "prompt" that is text')
    task, most = row.get("task"), row.get("max_tokens")
    if task is not None and (not isinstance(task, str) or not task):
        raise UsageError(f'{where}: "task" must be a name, not {task!r}')
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise UsageError(f'{where}: "max_tokens" must be a whole number of at least 1, not {most!r}')
    return Prompt(row["prompt"], task, most)


def parse_mix(text: str | None, prompts: Sequence[Prompt]) -> dict[str | None, float]:
    """Weights by task, like "qa=2,converse=1"; "uniform" or None: all tasks of the prompts alike.

    Raises:
        UsageError: a weight that is none, or a task without prompts.
    """
    tasks = list(dict.fromkeys(prompt.task for prompt in prompts))
    if text is None or text == "uniform":
        return dict.fromkeys(tasks, 1.0)
    mix: dict[str | None, float] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        task, _, weight = word.partition("=")
        if task not in tasks:
            there = ", ".join(sorted(task for task in tasks if task)) or "no tasks at all"
            raise UsageError(f"--task-mix {word!r}: no prompt has that task; there are {there}")
        try:
            value = float(weight or 1)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise UsageError(f"--task-mix {word!r}: {weight!r} is no weight of 0 or more")
        mix[task] = value
    if not sum(mix.values()):
        raise UsageError(f"--task-mix {text!r} leaves no task")
    return mix


@dataclass(frozen=True, slots=True)
class Ruler:
    """Characters of a prompt for a number of tokens, as measured on a server.

    Attributes:
        overhead: tokens that the server adds (chat template).
        characters: characters of a token by task; of others `usual`.
    """

    overhead: float = 0.0
    characters: Mapping[str | None, float] | None = None
    usual: float = USUAL_CHARACTERS

    def fit(self, prompt: Prompt, tokens: int) -> str:
        """The prompt's text, repeated or cut so that it has about `tokens` tokens; never less than a character."""
        each = (self.characters or {}).get(prompt.task, self.usual)
        wanted = max(1, round((tokens - self.overhead) * each))
        again = prompt.text + "\n\n"
        return (again * (wanted // len(again) + 1))[:wanted]

    @classmethod
    def of(cls, pairs: Mapping[str | None, tuple[tuple[int, int], tuple[int, int]]]) -> Ruler:
        """From two (characters, tokens) of each task, one text much shorter than the other."""
        characters: dict[str | None, float] = {}
        overheads = []
        for task, ((short, few), (long, many)) in pairs.items():
            if many > few and long > short:
                characters[task] = (long - short) / (many - few)
                overheads.append(few - short / characters[task])
        if not characters:
            return cls()
        mean = sum(characters.values()) / len(characters)
        return cls(max(0.0, sum(overheads) / len(overheads)), characters, mean)


def plan(
    arrivals: Sequence[Arrival],
    prompts: Sequence[Prompt],
    mix: Mapping[str | None, float],
    *,
    max_tokens: int,
    seed: int = 0,
    labels: bool = True,
    wrong_labels: float = 0.0,
    ruler: Ruler | None = None,
    context: int | None = None,
) -> tuple[list[Planned], int]:
    """Give each arrival a task (drawn by weight), a prompt of that task (in turn) and its limits.

    Args:
        arrivals: when, and how long where they say.
        prompts: of every task in `mix`.
        mix: weight by task.
        max_tokens: longest answer where neither arrival nor prompt says one.
        seed: of the tasks and of the wrong labels. Which requests are wrong with a small share is part of those
            that are with a larger one.
        labels: whether the server is told tasks.
        wrong_labels: share of requests whose label is another task.
        ruler: how to fit prompts to the arrivals' lengths; None: prompts stay as they are.
        context: prompt and answer together at most, where prompts are fitted; None: no limit.

    Returns:
        the requests, and how many of them were shortened to `context`.

    Raises:
        UsageError: wrong labels with a single task.
    """
    if not 0 <= wrong_labels <= 1:
        raise UsageError(f"--wrong-labels must be between 0 and 1, not {wrong_labels:g}")
    tasks = [task for task, weight in mix.items() if weight]
    if wrong_labels and len([task for task in tasks if task]) < 2:
        raise UsageError("--wrong-labels needs at least two tasks, to take one for the other")
    of_task = {task: [prompt for prompt in prompts if prompt.task == task] for task in tasks}
    turns = dict.fromkeys(tasks, 0)
    draw, spoil = random.Random(f"tasks:{seed}"), random.Random(f"labels:{seed}")
    made, shortened = [], 0
    for number, arrival in enumerate(arrivals):
        task = draw.choices(tasks, [mix[each] for each in tasks])[0]
        prompt = of_task[task][turns[task] % len(of_task[task])]
        turns[task] += 1
        # Drawn for every request, so that the same seed spoils the same ones whatever the share.
        chance, other = spoil.random(), spoil.choice([each for each in tasks if each != task] or [task])
        label = None if not labels else other if chance < wrong_labels else task
        request = Planned(
            number=number,
            at_s=arrival.at_s,
            task=task,
            label=label,
            prompt=prompt.text,
            max_tokens=arrival.output_tokens or prompt.max_tokens or max_tokens,
        )
        if ruler is not None and arrival.input_tokens is not None:
            tokens = arrival.input_tokens
            if context is not None and tokens + request.max_tokens > context:
                shortened += 1
                answer = min(request.max_tokens, max(context // 2, context - tokens))
                tokens = min(tokens, context - answer)
                request = replace(request, max_tokens=answer)
            request = replace(request, prompt=ruler.fit(prompt, tokens), input_tokens=tokens)
        made.append(request)
    return made, shortened
