"""How well keywords tell emoe-nano's eight tasks apart, and how long one prompt takes.

    python -m bench.task_keywords --data ../shared/data/tasks            # accuracy on held-out phrasings, time
    python -m bench.task_keywords --data ../shared/data/tasks --choose   # the grid that chose the settings

Settings are chosen on trained phrasings alone: one of the eight is left out, keywords are learned from the other seven
and scored on it, for each in turn. The held-out phrasings, which share no template with the trained ones, and held-out
examples are scored once with the chosen settings.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

from emoe.tasks.keywords import OTHER, Keywords
from training.data import Example, load
from training.templates import TASKS, TRAIN, render

Pairs = list[tuple[str, str]]
GRID: dict[str, tuple[Any, ...]] = {
    "edge_chars": (120, 160, 240, 400),
    "most": (20, 60, 100, 160),
    "prior_prompts": (1.0, 5.0),
    "least_z": (2.0, 4.0),
    "least_odds": (0.0, 1.1, 2.3),
}


def chosen(examples: list[Example], held_out: bool, each: int) -> dict[str, list[Example]]:
    """`each` real examples of every task, in an order that does not follow the files'."""
    sides = {
        task: sorted((e for e in examples if e.task == task and e.held_out == held_out), key=lambda e: e.key)
        for task in TASKS
    }
    return {task: [e for e in side if "," not in e.source][:each] for task, side in sides.items()}


def phrased(side: dict[str, list[Example]], phrasings: list[int], held_out: bool = False) -> Pairs:
    """(task, prompt): each example in one of the phrasings, in turn."""
    return [
        (task, render(task, e.fields, phrasings[i % len(phrasings)], held_out))
        for task, examples in side.items()
        for i, e in enumerate(examples)
    ]


def halves(side: dict[str, list[Example]]) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    """To learn from, and to score: no example is in both."""
    return {t: e[::2] for t, e in side.items()}, {t: e[1::2] for t, e in side.items()}


def accuracy(keywords: Keywords, pairs: Pairs) -> float:
    """Share of the pairs whose prompt the keywords give their task."""
    return sum(keywords.extract(prompt).task == task for task, prompt in pairs) / len(pairs)


def choose(side: dict[str, list[Example]]) -> None:
    """Print accuracy on the phrasing left out for every setting, best first."""
    learn, score = halves(side)
    folds = len(TRAIN[TASKS[0]])
    rows = []
    for values in product(*GRID.values()):
        settings = dict(zip(GRID, values, strict=True))
        each = []
        for left_out in range(folds):
            others = [p for p in range(folds) if p != left_out]
            keywords = Keywords.learn(phrased(learn, others), **settings)
            each.append(accuracy(keywords, phrased(score, [left_out])))
        rows.append((sum(each) / folds, min(each), settings))
    for mean, worst, settings in sorted(rows, key=lambda r: -r[0]):
        print(f"{mean:.4f}  worst phrasing {worst:.4f}  {settings}")


def unweighted(keywords: Keywords) -> Keywords:
    """The paper's rule: every keyword counts one."""
    return Keywords({t: dict.fromkeys(words, 1.0) for t, words in keywords.weights.items()}, keywords.edge_chars)


def report(train: dict[str, list[Example]], held: dict[str, list[Example]]) -> None:
    """Print accuracy by task and phrasing, what becomes of tasks unknown, and the time of an extraction."""
    keywords = Keywords.learn(phrased(train, list(range(8))))
    new = phrased(held, list(range(3)), held_out=True)
    known = phrased(held, list(range(8)))
    print(f"learned from {sum(map(len, train.values()))} prompts, scored on {len(new)} held-out examples")
    for name, each in (("weighted", keywords), ("counted (the paper's rule)", unweighted(keywords))):
        print(f"{name}: held-out phrasings {accuracy(each, new):.4f}, trained phrasings {accuracy(each, known):.4f}")
    for task in TASKS:
        mine = [pair for pair in new if pair[0] == task]
        wrong = Counter(keywords.extract(prompt).task for _, prompt in mine)
        right = wrong.pop(task, 0)
        top = ", ".join(list(keywords.weights[task])[:6])
        print(f"  {task:10} {right / len(mine):.3f}  to others: {dict(wrong.most_common(3))}  keywords: {top}")
    blind = {task: Keywords.learn(p for p in phrased(train, list(range(8))) if p[0] != task) for task in TASKS}
    strangers = {task: [p for t, p in new if t == task] for task in TASKS}
    gone = [blind[t].extract(p).task == OTHER for t, prompts in strangers.items() for p in prompts]
    print(f"prompts of a task left out of learning that go to {OTHER!r}: {sum(gone) / len(gone):.3f}")
    prompts = [prompt for _, prompt in new]
    random.Random(0).shuffle(prompts)
    best = min(_seconds(keywords, prompts) for _ in range(5))
    longest = max(prompts, key=len) * 100
    long = min(_seconds(keywords, [longest] * 100) for _ in range(5))
    print(f"{best * 1e6:.1f} us per prompt; {long * 1e6:.1f} us for one of {len(longest):,} characters")


def _seconds(keywords: Keywords, prompts: list[str]) -> float:
    start = time.perf_counter()
    for prompt in prompts:
        keywords.extract(prompt)
    return (time.perf_counter() - start) / len(prompts)


def main() -> None:
    """Print the report, or the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with one sub-folder per task")
    parser.add_argument("--each", type=int, default=300, help="prompts of each task to learn from (default: 300)")
    parser.add_argument("--choose", action="store_true", help="print the grid of settings instead")
    args = parser.parse_args()
    examples = load(args.data)
    train = chosen(examples, False, args.each)
    if args.choose:
        choose(train)
    else:
        report(train, chosen(examples, True, 300))


if __name__ == "__main__":
    main()
