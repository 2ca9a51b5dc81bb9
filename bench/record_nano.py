"""Record a routing trace of emoe-nano over prompts of every task, labelled with their tasks.

    python -m bench.record_nano OUT --data DIR [--side history|held-out] [--prompts 600] [--tokens 28] [--seed 0]

DIR holds the task sets that `training/data.py` reads. `history` takes examples of training's side in its phrasings;
`held-out` takes examples that training never saw, in phrasings that it never saw. Tasks take turns in random order.
Each prompt is answered greedily for `--tokens` tokens at most.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

import emoe
from emoe.model.bind import label_task
from training.data import Example, load
from training.templates import HELD_OUT, TASKS, TRAIN, render
from training.tokenizer import prompt_text

MAX_PROMPT_TOKENS = 384  # what emoe-nano was trained on


def choose(examples: list[Example], held_out: bool, total: int, seed: int) -> list[tuple[str, str]]:
    """`total` pairs (task, prompt), equally many of each task, shuffled; a task with too few gives what it has."""
    rng = random.Random(seed)
    family = HELD_OUT if held_out else TRAIN
    chosen: list[tuple[str, str]] = []
    for number, task in enumerate(TASKS):
        mine = sorted(
            (e for e in examples if e.task == task and e.held_out == held_out and "," not in e.source),
            key=lambda e: e.key,
        )
        wanted = total // len(TASKS) + (number < total % len(TASKS))
        for example in rng.sample(mine, min(wanted, len(mine))):
            phrasing = rng.randrange(len(family[task]))
            chosen.append((task, render(task, example.fields, phrasing, held_out)))
    rng.shuffle(chosen)
    return chosen


@torch.no_grad()
def record(out: Path, prompts: list[tuple[str, str]], tokens: int) -> None:
    """Answer every prompt with all experts resident, and write the routes to `out`."""
    model, tokenizer = emoe.load(trace=out)
    for number, (task, prompt) in enumerate(prompts):
        ids = tokenizer.encode(prompt_text(prompt), add_special_tokens=False)
        if len(ids) > MAX_PROMPT_TOKENS:
            ids = ids[: MAX_PROMPT_TOKENS // 2] + ids[-MAX_PROMPT_TOKENS // 2 :]
        label_task(model, task)
        given = torch.tensor([ids])
        model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False)
        if (number + 1) % 50 == 0:
            print(f"{number + 1}/{len(prompts)} prompts", flush=True)
    emoe.model.close(model)


def main() -> None:
    """Write one trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--side", choices=("history", "held-out"), default="history")
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prompts = choose(load(options.data), options.side == "held-out", options.prompts, options.seed)
    record(options.out, prompts, options.tokens)


if __name__ == "__main__":
    main()
