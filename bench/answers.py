"""How alike are emoe-nano's answers with few experts to its own with all? (paper, Fig. 13 and 14)

    python -m bench.answers --history TRACE [--data DIR] [--prompts 96] [--tokens 48]

The paper's accuracy: semantic similarity of the freely running answer to the full model's, by a sentence encoder (the
extra `similarity`), in percent, a mean over prompts. Modes: resident with task-aware loading (label, task-popularity
and sensitivity) and task-agnostic loading (static popularity, nothing else), a plan for every prompt; and balanced.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

import emoe
from bench.quality import SHARES, Item, items_of, profile_of
from emoe.model import close, label_task
from emoe.model.bind import binding_of
from emoe.profiling.similarity import SentenceEncoder
from emoe.tasks.sensitivity import Sensitivity


@torch.no_grad()
def similarity(
    items: list[Item], encoder: SentenceEncoder, tokens: int, label: bool, **options: Any
) -> dict[str, float]:
    """Mean similarity, over all prompts and by task; `items` hold the full model's answers."""
    model, tokenizer = emoe.load(**options)
    if tokenizer is None:
        raise SystemExit("emoe-nano has lost its tokenizer")
    binding_of(model).ahead.worth.judging = False  # plans are made whatever they cost
    found: dict[str, list[float]] = {}
    for item in items:
        label_task(model, item.task if label else None)
        ids = torch.tensor([item.ids])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        texts = [tokenizer.decode(each, skip_special_tokens=True) for each in (item.text, answer[0, ids.shape[1] :])]
        found.setdefault(item.task, []).extend(encoder.similarities(texts[0], texts[1:]))
    close(model)
    by_task = {task: 100 * float(np.mean(values)) for task, values in sorted(found.items())}
    return {"mean": 100 * float(np.mean([value for values in found.values() for value in values])), **by_task}


def main() -> None:
    """Print a line for each share and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--history", type=Path, required=True, metavar="TRACE", help="what predictors learn from")
    parser.add_argument("--data", type=Path, metavar="DIR", help="task sets to take held-out prompts from")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="where sensitivity comes from")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=384, help="the longest prompt; its middle is cut out")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of an answer at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    encoder = SentenceEncoder()
    items = items_of(args, reference=False)
    profile = profile_of(args, ["task-popularity", "static"])
    blind = dataclasses.replace(profile, sensitivity=Sensitivity.unknown(profile.shape.layers))
    for share in SHARES:
        common = {"expert_memory": f"{share:.0%}", "replan_prompts": 1}
        ways = {
            "task-aware": {"mode": "resident", "predictor": "task-popularity", "profile": profile, "label": True},
            "task-agnostic": {"mode": "resident", "predictor": "static", "profile": blind, "label": False},
            "balanced": {"mode": "balanced", "predictor": "task-popularity", "profile": profile, "label": True},
        }
        for way, options in ways.items():
            figures = similarity(items, encoder, args.tokens, **common, **options)
            print(
                f"{share:.0%} {way}: " + "  ".join(f"{name} {value:.1f}" for name, value in figures.items()), flush=True
            )


if __name__ == "__main__":
    main()
