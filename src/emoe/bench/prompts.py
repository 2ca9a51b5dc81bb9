"""Prompts of a given length: the same for every contender, another one for each round."""

from __future__ import annotations

import json
import random
from pathlib import Path

from emoe import nano
from emoe.bench.plant.card import is_planted, read_card
from emoe.bench.random_weights import card_of
from emoe.errors import UsageError


def prompt_ids(folder: Path, number: int, tokens: int, seed: int = 0) -> list[int]:
    """Token ids of prompt `number` for the checkpoint in `folder`.

    A model with a tokenizer reads real text: the held-out prompts of emoe-nano, one task after the other. A model of
    random weights reads random tokens; one that `random_weights.make_checkpoint` made, tokens of one topic. A planted
    one reads the tokens of its trace, each prompt where the one before ended.

    Raises:
        UsageError: the vocabulary is too small.
    """
    if is_planted(folder):
        return planted_ids(folder, number * tokens, tokens)[0]
    if (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists():
        return _text(folder, number, tokens)
    config = json.loads((folder / "config.json").read_text())
    vocabulary = int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 0))
    card = card_of(folder)
    topics = int(card["topics"]) if card else 1
    if vocabulary < topics:
        raise UsageError(f"{folder / 'config.json'} says vocab_size {vocabulary}: no random prompt can be made of it")
    rng = random.Random(f"{seed}:{number}")
    return [rng.randrange(vocabulary // topics) * topics + number % topics for _ in range(tokens)]


def planted_ids(folder: Path, start: int, tokens: int, batch: int = 1) -> list[list[int]]:
    """`tokens` of a planted checkpoint's trace from position `start` on, beginning anew after the last; with `batch`,
    so many sequences that begin equally far apart.

    Raises:
        UsageError: `folder` is no planted checkpoint.
    """
    there = read_card(folder).tokens
    return [[(start + there * row // batch + i) % there for i in range(tokens)] for row in range(batch)]


def _text(folder: Path, number: int, tokens: int) -> list[int]:
    from transformers import AutoTokenizer

    prompts = nano.prompts()
    tasks = sorted({prompt["task"] for prompt in prompts})
    mine = [prompt["prompt"] for prompt in prompts if prompt["task"] == tasks[number % len(tasks)]]
    turn = number // len(tasks) % len(mine)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    while len(ids) < tokens:
        ids += tokenizer("\n\n".join(mine[turn:] + mine[:turn]) + "\n\n")["input_ids"]
    return ids[:tokens]
