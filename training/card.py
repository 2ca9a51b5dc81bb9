"""Write the model card from the figures that `training.evaluate` left.

python -m training.card"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from training.data import SOURCES
from training.templates import TASKS

# The trial that came before: 12.1 M parameters, 6.7 M tokens, AdamW; its splits and tokenizer were its own.
TRIAL = {
    "summarise": 49.0, "classify": 1.9, "qa": 79.0, "ask": 50.0,
    "compare": 2.4, "converse": 79.0, "code": 7.8, "maths": 11.0,
}  # fmt: skip

TEMPLATE = Path(__file__).with_name("card_template.md")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows]) + "\n"


def growth(ratio: float) -> str:
    return f"{(ratio - 1) * 100:+.0f} %" if ratio < 10 else f"x {ratio:.0f}"


def quality(results: dict[str, Any]) -> str:
    rows = []
    for task in TASKS:
        q = results["quality"][task]
        row = [task, f"{q['perplexity']:.2f}", f"{TRIAL[task]:g}"]
        row += ["yes" if q["perplexity"] < TRIAL[task] else "**no**"]
        row += [f"{q[k]:.2f}" for k in ("perplexity_without_end", "bits_per_byte", "perplexity_new_phrasing")]
        rows.append([*row, str(q["prompts"]), str(q["answer_tokens"])])
    head = ["task", "perplexity", "trial", "better", "without end token", "bits per byte"]
    return table([*head, "in phrasings never trained on", "prompts", "answer tokens"], rows)


def rerouting(results: dict[str, Any]) -> str:
    rows = []
    for task in TASKS:
        by = results["rerouting"][task]
        rows.append([task, *[growth(by[p][w]) for p in ("60", "40") for w in ("task", "global", "random")]])
    head = ["task"]
    for p in ("60", "40"):
        count = int(results["rerouting"][TASKS[0]][p]["experts"])
        head += [f"{p} % ({count} of 16): task's", "global", "random"]
    return table(head, rows)


def answers(results: dict[str, Any]) -> str:
    parts = []
    for a in results["answers"]:
        quoted = "\n".join(f"> {line}".rstrip() for line in a["prompt"].split("\n"))
        parts.append(
            f"**{a['task']}**\n\n{quoted}\n\nAnswer:\n\n```text\n{a['answer']}\n```\n\n"
            f"Reference:\n\n```text\n{a['reference']}\n```\n"
        )
    return "\n".join(parts)


def card(results: dict[str, Any], size: int) -> str:
    t, r = results["training"], results["routing"]
    shares = zip(r["smallest_share_times_experts"], r["largest_share_times_experts"], strict=True)
    balance = [[str(layer), f"{low:.2f}", f"{high:.2f}"] for layer, (low, high) in enumerate(shares)]
    counts = [[k, f"{v['train']:,}", f"{v['held_out']:,}"] for k, v in results["examples"].items()]
    return TEMPLATE.read_text(encoding="utf-8").format(
        **t["shape"],
        **results["accuracy"],
        **{k: t["arguments"][k] for k in ("muon_lr", "adam_lr", "decay", "dropout")},
        size=size,
        note=results["note"],
        millions=t["parameters"] / 1e6,
        tokens=t["tokens"] / 1e6,
        step=t["step"],
        batch=int(t["arguments"]["batch"]),
        minutes=t["elapsed"] / 60,
        threads=t["threads"],
        device=t["device"].upper(),
        rate=t["tokens_per_s"],
        epochs="; ".join(f"{k.strip('/').replace('/', ': ')} {v:.1f}" for k, v in t["epochs"].items()),
        sources=table(["set", "licence"], [[k, v] for k, v in SOURCES.items()]),
        example_counts=table(["task", "training examples", "held-out examples"], counts),
        quality=quality(results),
        prompts_per_task=r["prompts_per_task"],
        balance=table(["layer", "smallest", "largest"], balance),
        nn=r["one_nearest_neighbour"],
        nn_new=r["one_nearest_neighbour_new_phrasing"],
        own_top=", ".join(f"{v:.0%} ({k})" for k, v in r["task_share_in_own_top_6"].items()),
        global_top=r["global_share_in_top_6"],
        rerouting=rerouting(results),
        answers=answers(results),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("training/results.json"))
    parser.add_argument("--nano", type=Path, default=Path("src/emoe/nano"))
    args = parser.parse_args()
    target = args.nano / "checkpoint" / "README.md"
    size = sum(f.stat().st_size for f in args.nano.rglob("*") if f.is_file() and "py" not in f.suffix)
    text = card(json.loads(args.results.read_text(encoding="utf-8")), size)
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
