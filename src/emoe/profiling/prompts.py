"""The prompts a profile is made from: JSON lines with a task, a prompt or messages, and perhaps a reference answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe.errors import UsageError
from emoe.tasks.keywords import OTHER, instruction_of

REMEDY = 'each line is a JSON object such as {"task": "maths", "prompt": "What is 2 + 2?"}'


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line: its task, the conversation, the text that tells the task, and a reference answer or None."""

    line: int
    task: str
    messages: tuple[Mapping[str, str], ...]
    text: str
    reference: str | None


def read_prompts(file: Path) -> list[Prompt]:
    """Read and check the whole file; blank lines are skipped.

    Raises:
        UsageError: no such file, no prompts, or a line that is not what `REMEDY` says (named by its number).
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the prompts {file} cannot be read: {error}. Give a file of JSON lines; {REMEDY}.") from error
    prompts = [_prompt(file, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise UsageError(f"{file} holds no prompts; {REMEDY}.")
    return prompts


def _prompt(file: Path, number: int, line: str) -> Prompt:
    def refuse(why: str) -> UsageError:
        return UsageError(f"line {number} of {file} {why}; {REMEDY}.")

    try:
        row = json.loads(line)
    except ValueError as error:
        raise refuse(f"is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise refuse("is not an object")
    task = row.get("task")
    if not isinstance(task, str) or not task.strip():
        raise refuse("has no task")
    if task == OTHER:
        raise refuse(f"has the task {OTHER!r}, the name for prompts of no known task: give it another")
    reference = row.get("reference")
    if reference is not None and not isinstance(reference, str):
        raise refuse("has a reference that is no text")
    if ("prompt" in row) == ("messages" in row):
        raise refuse("needs a prompt or messages, one of them")
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            raise refuse("has an empty prompt")
        return Prompt(number, task, ({"role": "user", "content": row["prompt"]},), row["prompt"], reference)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise refuse('has messages that are not a list of {"role": ..., "content": ...}')
    plain = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in messages)
    return Prompt(number, task, plain, instruction_of(plain), reference)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def tasks_of(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """The labels, in the order in which they come first."""
    return tuple(dict.fromkeys(prompt.task for prompt in prompts))


def first_of_each(prompts: Sequence[Prompt], most: int) -> list[int]:
    """Indices of the first `most` prompts of every task, in the order of the file."""
    seen: dict[str, int] = {}
    chosen = []
    for index, prompt in enumerate(prompts):
        seen[prompt.task] = seen.get(prompt.task, 0) + 1
        if seen[prompt.task] <= most:
            chosen.append(index)
    return chosen


def encode_all(
    prompts: Sequence[Prompt], tokenizer: Any, name: str, context: int | None, new_tokens: int
) -> list[list[int]]:
    """Token ids of every prompt.

    Raises:
        UsageError: there is no tokenizer, or a prompt and `new_tokens` do not fit the context (named by its line).
    """
    from emoe.model.encoding import encode  # brings torch

    ids = [encode(tokenizer, prompt.messages, name=name) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if context is not None and len(tokens) + new_tokens > context:
            raise UsageError(
                f"the prompt of line {prompt.line} has {len(tokens)} tokens, and {name} was made for {context}, the "
                f"answer's {new_tokens} included: shorten it, or lower --max-new-tokens."
            )
    return ids


def digest(prompts: Sequence[Prompt]) -> str:
    """A hash of what the prompts say, to tell whether a run that goes on was begun with the same ones."""
    text = json.dumps([[p.task, list(p.messages), p.reference] for p in prompts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
