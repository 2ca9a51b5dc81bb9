"""Prompts of every task as JSON lines (`task`, `prompt`, `reference`), for `emoe profile` and `emoe reproduce`.

    python -m bench.task_prompts OUT --data DIR [--side history|held-out] [--prompts 600] [--seed 0]

DIR holds the task sets that `training/data.py` reads. `history` takes examples of training's side in its phrasings;
`held-out` takes examples that training never saw, in phrasings that it never saw. Tasks take turns in random order.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from training.data import Example, load
from training.templates import HELD_OUT, TASKS, TRAIN, render

Row = tuple[str, str, str]
"""Task, prompt, reference."""


def choose(examples: list[Example], held_out: bool, total: int, seed: int) -> list[Row]:
    """`total` rows, equally many of each task, shuffled; a task with too few gives what it has."""
    rng = random.Random(seed)
    family = HELD_OUT if held_out else TRAIN
    chosen: list[Row] = []
    for number, task in enumerate(TASKS):
        mine = sorted(
            (e for e in examples if e.task == task and e.held_out == held_out and "," not in e.source),
            key=lambda e: e.key,
        )
        wanted = total // len(TASKS) + (number < total % len(TASKS))
        for example in rng.sample(mine, min(wanted, len(mine))):
            phrasing = rng.randrange(len(family[task]))
            chosen.append((task, render(task, example.fields, phrasing, held_out), example.answer))
    rng.shuffle(chosen)
    return chosen


def parser_for(description: str | None) -> argparse.ArgumentParser:
    """The options that say which prompts to choose, and the file to write."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--side", choices=("history", "held-out"), default="history")
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def chosen_by(options: argparse.Namespace) -> list[Row]:
    """The rows that options of `parser_for` ask for."""
    return choose(load(options.data), options.side == "held-out", options.prompts, options.seed)


def main() -> None:
    """Write one file."""
    options = parser_for(__doc__).parse_args()
    lines = (
        json.dumps({"task": task, "prompt": prompt, "reference": answer}) for task, prompt, answer in chosen_by(options)
    )
    options.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
