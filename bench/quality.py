"""What experts that are not there cost in quality: emoe-nano in the engine, beside itself with every expert resident.

    python -m bench.quality replan    --history TRACE [--data DIR]    perplexity against p (paper, Fig. 10)
    python -m bench.quality tasks     --history TRACE [--data DIR]    task-aware and task-agnostic loading (Fig. 13)
    python -m bench.quality shares    --history TRACE [--data DIR]    accuracy against the share of experts (Fig. 15)
    python -m bench.quality modes     --history TRACE [--data DIR]    exact, balanced and resident
    python -m bench.quality overhead  --history TRACE [--data DIR]    what predicting takes (section 5.7)

TRACE is what predictors learn from (`bench/record_nano.py --side history` makes one); prompts are held-out ones, those
shipped with emoe-nano or, with DIR, of the task sets that `training/data.py` reads. Every prompt is read alone, then
its text is fed token by token: the full model's own greedy answer, or for `replan` the data's reference. Accuracy is
the share of the text's tokens that are the likeliest; the ratio is the full model's perplexity of the text over this
one's. Sensitivity comes from --profile, by default the shipped one; without it every task is sensitive everywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import emoe
from emoe import nano
from emoe.checkpoint.fingerprint import fingerprint
from emoe.model import close, label_task
from emoe.model.bind import binding_of
from emoe.prediction.protocol import Array, RoutingShape, UseScorer
from emoe.prediction.registry import PREDICTORS, SCORERS, make_predictor, make_scorer
from emoe.routing.trace import Trace
from emoe.tasks.keywords import Keywords
from emoe.tasks.lengths import lengths_by_task
from emoe.tasks.profile import PredictorStates, Profile
from emoe.tasks.sensitivity import Sensitivity

SHARES = (0.4, 0.6, 0.8)
NETWORKS = ("emoe-a", "emoe-l")


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt: its ids, the text to be judged, and what the full model makes of that text."""

    task: str
    ids: list[int]
    text: list[int]
    nll: float


@dataclass(slots=True)
class Tally:
    """Sums over prompts."""

    tokens: int = 0
    agreed: int = 0
    nll: float = 0.0
    full_nll: float = 0.0
    by_task: dict[str, Tally] = field(default_factory=dict)

    def add(self, item: Item, agreed: int, nll: float) -> None:
        """Add one prompt."""
        self.tokens += len(item.text)
        self.agreed += agreed
        self.nll += nll
        self.full_nll += item.nll

    def as_dict(self) -> dict[str, float]:
        """Accuracy, perplexity, and the full model's perplexity over it."""
        return {
            "accuracy": round(self.agreed / self.tokens, 4),
            "perplexity": round(math.exp(self.nll / self.tokens), 3),
            "ratio": round(math.exp((self.full_nll - self.nll) / self.tokens), 4),
        }


class Random:
    """Expects anything."""

    name = "random"

    def __init__(self, shape: RoutingShape) -> None:
        self._shape = shape
        self._random = np.random.default_rng(0)

    def begin_prompt(self, task: str | None) -> None:
        """Nothing is learned."""

    def observe(self, routes: Array) -> None:
        """Nothing is learned."""

    def predict(self, task: str | None) -> Array:
        """Shares at random."""
        return self._random.random((self._shape.layers, self._shape.experts))


class ByScore:
    """A scorer of expected use as a predictor: shares that fall with the rank of the score."""

    def __init__(self, shape: RoutingShape, scorer: UseScorer) -> None:
        self.name = scorer.name
        self._shape = shape
        self._scorer = scorer

    def begin_prompt(self, task: str | None) -> None:
        """Pass it on."""
        self._scorer.begin_prompt(task)

    def observe(self, routes: Array) -> None:
        """Pass it on, token by token as decoding would."""
        for row in range(len(routes)):
            self._scorer.observe(routes[row : row + 1])

    def predict(self, task: str | None) -> Array:
        """1 for the lowest score of a layer, up to the number of experts, scaled."""
        ranks = np.argsort(np.argsort(self._scorer.scores(), axis=1, kind="stable"), axis=1) + 1.0
        return self._shape.normalised(ranks)


# -- prompts ------------------------------------------------------------------------------------------------


def prompts_of(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(task, prompt, reference), held out."""
    if args.data is None:
        return [(p["task"], p["prompt"], p["reference"]) for p in nano.prompts()][: args.prompts]
    from bench.task_prompts import choose
    from training.data import load

    return choose(load(args.data), True, args.prompts, args.seed)


@torch.no_grad()
def items_of(args: argparse.Namespace, reference: bool) -> list[Item]:
    """The prompts with the texts to judge, and the full model's negative log-likelihood of each."""
    model, tokenizer = emoe.load()
    if tokenizer is None:
        raise SystemExit("emoe-nano has lost its tokenizer")
    items = []
    for task, prompt, answer in prompts_of(args):
        message = [{"role": "user", "content": prompt}]
        ids = list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
        if len(ids) > args.prompt_tokens:
            ids = ids[: args.prompt_tokens // 2] + ids[-args.prompt_tokens // 2 :]
        if reference:
            text = tokenizer.encode(answer, add_special_tokens=False)[: args.tokens]
        else:
            given = torch.tensor([ids])
            found = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=args.tokens, do_sample=False
            )
            text = found[0, len(ids) :].tolist()
        if text:
            items.append(Item(task, ids, text, judge(model, Item(task, ids, text, 0.0))[1]))
    close(model)
    return items


def judge(model: Any, item: Item) -> tuple[int, float]:
    """Tokens of the text that are the likeliest, and its negative log-likelihood, fed as decoding would feed it."""
    out = model(input_ids=torch.tensor([item.ids]), use_cache=True)
    agreed, nll = 0, 0.0
    for number, token in enumerate(item.text):
        logits = out.logits[0, -1].float()
        agreed += int(int(logits.argmax()) == token)
        nll -= float(torch.log_softmax(logits, -1)[token])
        if number + 1 < len(item.text):
            out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    return agreed, nll


@torch.no_grad()
def run(items: Sequence[Item], label: bool = True, **options: Any) -> dict[str, Any]:
    """Judge every item one way; return its figures and the engine's."""
    model, _ = emoe.load(**options)
    binding_of(model).ahead.worth.judging = False  # what a predictor costs is `overhead`'s question
    total = Tally()
    start = time.perf_counter()
    for item in items:
        label_task(model, item.task if label else None)
        agreed, nll = judge(model, item)
        total.add(item, agreed, nll)
        total.by_task.setdefault(item.task, Tally()).add(item, agreed, nll)
    seconds = time.perf_counter() - start
    stats = emoe.stats(model)
    close(model)
    figures: dict[str, Any] = total.as_dict()
    figures["by_task"] = {task: tally.as_dict() for task, tally in sorted(total.by_task.items())}
    figures |= {name: stats[name] for name in ("rerouted_share", "plans", "hit_rate", "predictions", "prefetch")}
    return figures | {"seconds": round(seconds, 2), "megabytes_read": round(stats["bytes_read"] / 1e6, 1)}


# -- what is known beforehand -------------------------------------------------------------------------------


def profile_of(args: argparse.Namespace, names: Sequence[str]) -> Profile:
    """A profile with the named predictors learned from the history, and sensitivity where one was measured."""
    folder = args.profile or nano.profile_path()
    mark = fingerprint(nano.path())
    history = Trace.read(args.history)
    shape = RoutingShape.of(history)
    if (folder / "profile.json").is_file():
        profile = Profile.read(folder, mark)
    else:
        by_task = {task: shares for task, shares in history.shares_by_task().items()}
        profile = Profile(
            fingerprint=mark,
            shape=shape,
            tasks=history.tasks,
            keywords=Keywords({}),
            lengths=lengths_by_task(history),
            sensitivity=Sensitivity.unknown(shape.layers),
            popularity=by_task | {"other": history.shares()},
        )
    states = {}
    for name in names:
        made: Any = make_predictor(name, shape)
        start = time.perf_counter()
        made.fit(history, seed=args.seed)
        states[name] = made.state()
        print(f"# {name} learned from {history.num_prompts} prompts in {time.perf_counter() - start:.1f} s", flush=True)
    return dataclasses.replace(profile, predictors=PredictorStates({**profile.predictors, **states}))


def register() -> None:
    """The predictors that only this comparison has."""
    PREDICTORS.setdefault("random", Random)
    for name in sorted(SCORERS):
        PREDICTORS.setdefault(name, lambda shape, name=name: ByScore(shape, make_scorer(name, shape)))  # type: ignore[misc]


# -- experiments --------------------------------------------------------------------------------------------


def replan(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Perplexity of the references against p; p = 0: every prompt with its own routes and plan."""
    items = items_of(args, reference=True)
    profile = profile_of(args, ["task-popularity"])
    rows = [{"p": "full", **run(items, expert_memory=None)}]
    for p in (0, 20, 40, 60, 80):
        common = {"mode": "resident", "expert_memory": args.memory, "replan_prompts": max(p, 1)}
        rows.append({"p": p, "way": "own routes", **run(items, **common)})
        rows.append(
            {"p": p, "way": "task-popularity", **run(items, predictor="task-popularity", profile=profile, **common)}
        )
    return rows


def tasks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy by task; task-agnostic loading knows neither the prompt's task nor sensitivity."""
    items = items_of(args, reference=False)
    profile = profile_of(args, ["task-popularity", "static"])
    blind = dataclasses.replace(profile, sensitivity=Sensitivity.unknown(profile.shape.layers))
    rows = []
    for share in (0.4, 0.6, 0.8):
        common = {"mode": "resident", "expert_memory": f"{share:.0%}", "replan_prompts": 1}
        aware = run(items, predictor="task-popularity", profile=profile, **common)
        agnostic = run(items, label=False, predictor="static", profile=blind, **common)
        rows += [{"share": share, "way": "task-aware", **aware}, {"share": share, "way": "task-agnostic", **agnostic}]
    return rows


def shares(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy against the share of experts, by what chooses them."""
    items = items_of(args, reference=False)
    scorers = [name for name in ("next-use",) if name in SCORERS]
    networks = [] if args.no_networks else list(NETWORKS)
    register()
    profile = profile_of(args, ["task-popularity", *networks])
    ways = [(name, 40, name) for name in ("random", "task-popularity", *scorers, *networks)]
    ways += [("eMoE-E", 1, "emoe-a")] * bool(networks)
    ways += [(f"{name}, p = 1", 1, name) for name in ("task-popularity", *scorers)]
    rows = []
    for share in SHARES:
        common = {"mode": "resident", "expert_memory": f"{share:.0%}"}
        for way, p, name in ways:
            figures = run(items, predictor=name, profile=profile, replan_prompts=p, **common)
            rows.append({"share": share, "way": way, "p": p, **figures})
            _print(rows[-1:])
    return rows


def modes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The dial from resident to exact."""
    items = items_of(args, reference=False)
    profile = profile_of(args, ["task-popularity"])
    rows = []
    for share in (0.4, 0.6, 0.8):
        common = {"expert_memory": f"{share:.0%}", "replan_prompts": 40, "predictor": "task-popularity"}
        rows.append({"share": share, "way": "resident", **run(items, mode="resident", profile=profile, **common)})
        for threshold in (0.7, 0.85, 0.95):
            dial = {"mode": "balanced", "sensitivity_threshold": threshold}
            rows.append(
                {"share": share, "way": f"balanced {threshold}", **run(items, profile=profile, **dial, **common)}
            )
        rows.append({"share": share, "way": "exact", **run(items, mode="exact", profile=profile, **common)})
    return rows


def overhead(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of predicting beside the run's, on and beside the critical path."""
    items = items_of(args, reference=False)
    names = ["static", "task-popularity", "moe-infinity", *([] if args.no_networks else NETWORKS)]
    profile = profile_of(args, [name for name in names if name != "static"])
    common = {"mode": "resident", "expert_memory": args.memory}
    rows = [{"way": "own routes", "p": 40, **run(items, replan_prompts=40, **common)}]
    for name in names:
        for p in (40, 1):
            rows.append(
                {"way": name, "p": p, **run(items, predictor=name, profile=profile, replan_prompts=p, **common)}
            )
    for row in rows:
        spent, ahead = row["predictions"], row["prefetch"]
        row["ms_per_prediction"] = round(1e3 * spent["seconds"] / max(1, spent["calls"]), 2)
        row["predictor_mb"] = round(spent["memory_bytes"] / 1e6, 1)
        row["on_path_share"] = round((ahead["overhead_s"] if ahead else 0.0) / row["seconds"], 5)
    return rows


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "replan": replan,
    "tasks": tasks,
    "shares": shares,
    "modes": modes,
    "overhead": overhead,
}
_SHOWN = (
    "share",
    "way",
    "p",
    "accuracy",
    "perplexity",
    "ratio",
    "rerouted_share",
    "plans",
    "megabytes_read",
    "seconds",
)


def _print(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        shown = (*_SHOWN, "ms_per_prediction", "predictor_mb", "on_path_share")
        print("  ".join(f"{name} {_short(row[name])}" for name in shown if name in row), flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run one experiment and print a line for each way; --json keeps everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--history", type=Path, required=True, metavar="TRACE", help="what predictors learn from")
    parser.add_argument("--data", type=Path, metavar="DIR", help="task sets to take held-out prompts from")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="where sensitivity comes from")
    parser.add_argument("--prompts", type=int, default=64, help="prompts in all (default: 64)")
    parser.add_argument("--prompt-tokens", type=int, default=384, help="the longest prompt; its middle is cut out")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each text at most (default: 24)")
    parser.add_argument("--memory", default="60%", help="expert memory where the experiment does not vary it")
    parser.add_argument("--no-networks", action="store_true", help="leave out eMoE-A and eMoE-L, which take training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, also those by task")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = EXPERIMENTS[args.experiment](args)
    print()
    _print(rows)
    if args.experiment == "tasks":
        for row in rows:
            of = "  ".join(f"{task} {tally['accuracy']:.3f}" for task, tally in row["by_task"].items())
            print(f"share {row['share']} {row['way']}: {of}")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
