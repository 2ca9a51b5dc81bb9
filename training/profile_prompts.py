"""Write the prompts that emoe-nano's profile is made from: trained phrasings around examples of training's side.

    python -m training.profile_prompts --data ../shared/data/tasks --out build/profile_prompts.jsonl
    emoe profile --prompts build/profile_prompts.jsonl --out src/emoe/nano/profile --sensitivity-prompts 12

Nothing that is held out, neither an example nor a phrasing, is in them, so the profile may be judged on those.
Tasks take turns. The file itself is not shipped: some of the texts may not be (training/data.py)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from training.data import Example, load
from training.templates import TASKS, render

EACH = 64


def rows(examples: list[Example], each: int) -> Iterator[dict[str, str]]:
    """`each` prompts of every task with their references, tasks in turn; exercises made for training are left out."""
    sides = {
        task: sorted(
            (e for e in examples if e.task == task and not e.held_out and "," not in e.source), key=lambda e: e.key
        )
        for task in TASKS
    }
    for i in range(each):
        for task, side in sides.items():
            example = side[i]
            yield {"task": task, "prompt": render(task, example.fields, i), "reference": example.answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=EACH, help=f"prompts of each task (default: {EACH})")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows(load(args.data), args.each)]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
