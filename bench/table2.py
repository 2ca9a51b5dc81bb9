"""How well do predictors name the experts of the next prompt? The paper's Table 2, beside simple baselines.

    python bench/table2.py TRACE [--history TRACE | --split SEED] [--models xlnet,gpt2,bert] [--kinds a,l]
                           [--seeds 0,1] [--after N] [--order trace] [--no-tasks] [--model-bytes N] [--json]

Without `--history`, half of TRACE's prompts, drawn with the seed of `--split`, are learned from and the other half is
scored; both in random order (`--order trace` keeps the trace's, where prompts of one task may follow each other). With
several `--seeds`, the split (or the order) and the training are drawn anew for each and figures are means, with the
largest deviation in brackets.

With `--after N` a predictor is asked once more knowing the prompt's first N tokens, and
scored on the rest.

The measure is that of `emoe.prediction.scoring`; `best possible` says what the best set for each prompt would score.

MS is the processor time of one prediction in milliseconds, FIT_S that of learning, MB the size of the network.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch

from emoe.prediction.scoring import BOUND, SIMPLE, Row, measure, network_name, sides, summed_up, unlabelled
from emoe.routing.trace import Trace


def line(row: Row, after: int, model_bytes: int) -> str:
    """One line of the table."""
    where = "next prompt" if row.when == "boundary" else f"after {after} tokens"
    figures, parts = row.figures, []
    for key in ("accuracy", "precision", "recall", "f1", "hit_at_40"):
        parts.append(f"{figures[key]:.3f} ({row.deviation[key]:.3f})")
    share = f" {100 * figures['mb'] * 1e6 / model_bytes:.3f} % of the model" if model_bytes and figures["mb"] else ""
    cost = f"{figures['ms']:7.2f} {figures['fit_s']:7.1f} {figures['mb']:6.2f}{share}"
    return f"{row.predictor:<16} {where:<16} {'  '.join(parts)} {cost}"


def main() -> None:
    """Print a line for each predictor, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--history")
    parser.add_argument("--split", type=int, default=0)
    parser.add_argument("--models", default="xlnet,gpt2,bert")
    parser.add_argument("--kinds", default="a,l")
    parser.add_argument("--seeds", help="several splits, for means; replaces --split")
    parser.add_argument("--after", type=int, default=0)
    parser.add_argument("--order", choices=("random", "trace"), default="random")
    parser.add_argument("--no-tasks", action="store_true")
    parser.add_argument(
        "--model-bytes", type=int, default=0, help="the model's size, to give the networks' share of it"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trace = Trace.read(options.trace)
    history = Trace.read(options.history) if options.history else None
    if options.no_tasks:
        trace, history = unlabelled(trace), None if history is None else unlabelled(history)
    seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else [options.split]
    networks = [
        network_name(model, kind)
        for model in filter(None, options.models.split(","))
        for kind in filter(None, options.kinds.split(","))
    ]
    if not options.json:
        columns = "".join(f"{name:<15}" for name in ("accuracy", "precision", "recall", "F1", "hit@40"))
        print(f"{'':<33} {columns}{'MS':>6} {'FIT_S':>7} {'MB':>6}")
    rows = []
    for name in (*SIMPLE, *networks, BOUND):
        runs = [measure(name, *sides(trace, history, s, options.order == "trace"), s, options.after) for s in seeds]
        for row in summed_up(name, runs):
            rows.append(asdict(row))
            if not options.json:
                print(line(row, options.after, options.model_bytes), flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
