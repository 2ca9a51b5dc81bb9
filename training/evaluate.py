"""Measure the exported checkpoint with transformers alone and write every figure of its card.

    python -m training.evaluate --data ../shared/data/tasks --state build/nano

Perplexity is of the answer's tokens and the end token that closes it, given the prompt, in f32 from the
shipped bf16 weights. None of it was trained on; popularity of experts is counted on training's side."""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.batches import Document, encode
from training.data import Example, load
from training.routing import most_popular, nearest_neighbour, only, shares
from training.templates import HELD_OUT, TASKS, TRAIN, render
from training.tokenizer import prompt_text

RANDOM_DRAWS = 3


class Bench:
    """The shipped model, its tokenizer, and examples by task and side."""

    def __init__(self, folder: Path, examples: list[Example]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if torch.cuda.is_available():
            self.model.cuda()
        self.sides = {
            (task, held): sorted(
                (e for e in examples if e.task == task and e.held_out == held and "," not in e.source),
                key=lambda e: e.key,
            )
            for task in TASKS
            for held in (False, True)
        }

    def documents(
        self, task: str, most: int, held_out: bool = True, new_phrasing: bool = False
    ) -> list[tuple[Example, Document]]:
        family = (HELD_OUT if new_phrasing else TRAIN)[task]
        pairs = []
        for i, e in enumerate(self.sides[task, held_out][:most]):
            prompt = render(task, e.fields, i % len(family), new_phrasing)
            pairs.append((e, encode(self.tokenizer, task, prompt, e.answer)))
        return pairs

    @torch.no_grad()
    def losses(self, document: Document) -> Tensor:
        ids = torch.tensor(document.ids, device=self.model.device)
        logits = self.model(ids[None]).logits[0, document.prompt_tokens - 1 : -1].float()
        return torch.nn.functional.cross_entropy(logits, ids[document.prompt_tokens :], reduction="none").cpu()

    def perplexity(self, pairs: list[tuple[Example, Document]]) -> float:
        losses = torch.cat([self.losses(d) for _, d in pairs])
        return math.exp(float(losses.mean()))

    @torch.no_grad()
    def answer(self, prompt: str, most: int = 200) -> str:
        ids = self.tokenizer.encode(prompt_text(prompt), add_special_tokens=False)
        given = torch.tensor([ids], device=self.model.device)
        mask = torch.ones_like(given)
        out = self.model.generate(given, attention_mask=mask, max_new_tokens=most, do_sample=False)
        text: str = self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        return text


def quality(bench: Bench, most: int) -> dict[str, dict[str, float]]:
    """Per task: perplexity, the same without the end token, bits per byte, perplexity in unseen phrasings."""
    result = {}
    for task in TASKS:
        pairs = bench.documents(task, most)
        losses = [bench.losses(d) for _, d in pairs]
        total, count = sum(float(x.sum()) for x in losses), sum(len(x) for x in losses)
        end = bench.tokenizer.eos_token_id
        inner = torch.cat([x[:-1] if d.ids[-1] == end else x for x, (_, d) in zip(losses, pairs, strict=True)])
        whole = [(x, e) for x, (e, d) in zip(losses, pairs, strict=True) if d.ids[-1] == end]
        size = sum(len(e.answer.encode()) for _, e in whole)
        result[task] = {
            "prompts": len(pairs),
            "answer_tokens": count,
            "perplexity": math.exp(total / count),
            "perplexity_without_end": math.exp(float(inner.mean())),
            "bits_per_byte": sum(float(x.sum()) for x, _ in whole) / math.log(2) / size,
            "perplexity_new_phrasing": bench.perplexity(bench.documents(task, most // 2, new_phrasing=True)),
        }
        print(task, result[task], flush=True)
    return result


def routing(bench: Bench, most: int) -> dict[str, Any]:
    """Balance and specialisation over held-out prompts, equally many per task; answers are not counted."""
    vectors, labels, fresh, fresh_labels = [], [], [], []
    for task in TASKS:
        for _, d in bench.documents(task, most):
            vectors.append(shares(bench.model, d.ids[: d.prompt_tokens]))
            labels.append(task)
        for _, d in bench.documents(task, most, new_phrasing=True):
            fresh.append(shares(bench.model, d.ids[: d.prompt_tokens]))
            fresh_labels.append(task)
    table, new = torch.stack(vectors).cpu(), torch.stack(fresh).cpu()
    experts = table.shape[2]
    tasks = torch.stack([table[[name == t for name in labels]].mean(0) for t in TASKS])
    overall = tasks.mean(0)
    apart = 0.5 * (tasks - overall).abs().sum(2).mean()
    return {
        "prompts_per_task": most,
        "smallest_share_times_experts": [float(x) * experts for x in overall.min(1).values],
        "largest_share_times_experts": [float(x) * experts for x in overall.max(1).values],
        "one_nearest_neighbour": nearest_neighbour(table.flatten(1), labels),
        "one_nearest_neighbour_new_phrasing": nearest_neighbour(new.flatten(1), fresh_labels, table.flatten(1), labels),
        "mean_total_variation_task_from_mean": float(apart),
        "task_share_in_own_top_6": {
            t: float(s.topk(6, dim=1).values.sum(1).mean()) for t, s in zip(TASKS, tasks, strict=True)
        },
        "global_share_in_top_6": float(overall.topk(6, dim=1).values.sum(1).mean()),
    }


def rerouting(bench: Bench, most: int) -> dict[str, Any]:
    """Perplexity when tokens stay inside a part of the experts, over the perplexity with all of them."""
    experts = bench.model.config.num_experts
    layers = bench.model.config.num_hidden_layers
    popular = {}
    for task in TASKS:
        pairs = bench.documents(task, most, held_out=False)
        popular[task] = torch.stack([shares(bench.model, d.ids[: d.prompt_tokens]) for _, d in pairs]).mean(0)
    everywhere = torch.stack(list(popular.values())).mean(0)
    result: dict[str, Any] = {}
    for task in TASKS:
        pairs = bench.documents(task, most)
        full = bench.perplexity(pairs)
        result[task] = {}
        for percent in (60, 40):
            count = round(experts * percent / 100)
            rng = random.Random(percent)
            chosen = [
                [torch.tensor(sorted(rng.sample(range(experts), count))) for _ in range(layers)]
                for _ in range(RANDOM_DRAWS)
            ]
            draws = [[torch.zeros(experts, dtype=torch.bool).index_fill_(0, c, True) for c in d] for d in chosen]
            ways = {
                "task": [most_popular(popular[task], count)],
                "global": [most_popular(everywhere, count)],
                "random": draws,
            }
            row = {"experts": float(count)}
            for name, sets in ways.items():
                ratios = []
                for allowed in sets:
                    with only(bench.model, [m.to(bench.model.device) for m in allowed]):
                        ratios.append(bench.perplexity(pairs) / full)
                row[name] = math.exp(sum(map(math.log, ratios)) / len(ratios))
            result[task][str(percent)] = row
        print(task, result[task], flush=True)
    return result


def correlation(a: list[float], b: list[float]) -> float:
    return float(torch.corrcoef(torch.tensor([a, b]))[0, 1])


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def accuracy(bench: Bench, most: int) -> dict[str, float]:
    """What greedy answers are worth, where an answer is right or wrong."""

    def answers(task: str, count: int, tokens: int) -> list[tuple[Example, str]]:
        examples = bench.sides[task, True][:count]
        family = TRAIN[task]
        return [(e, bench.answer(render(task, e.fields, i % len(family)), tokens)) for i, e in enumerate(examples)]

    labels = answers("classify", most, 8)
    kinds = {kind: [(e, a) for e, a in labels if kind in e.fields["labels"]] for kind in ("neutral", "joy")}
    qa = answers("qa", most, 40)
    scores = answers("compare", most, 6)
    maths = answers("maths", most // 4, 160)
    return {
        "classify_sentiment": sum(e.answer == a for e, a in kinds["neutral"]) / max(1, len(kinds["neutral"])),
        "classify_emotion": sum(e.answer == a for e, a in kinds["joy"]) / max(1, len(kinds["joy"])),
        "qa_exact": sum(e.answer.strip(" .").lower() == a.strip(" .").lower() for e, a in qa) / len(qa),
        "qa_answer_in_passage": sum(a in e.fields["text"] for e, a in qa) / len(qa),
        "compare_pearson": correlation([number(e.answer) for e, _ in scores], [number(a) for _, a in scores]),
        "maths_final_number": sum(e.answer.split()[-1] == (a.split() or [""])[-1] for e, a in maths) / len(maths),
    }


def examples_of(bench: Bench, prompts: Path, per_task: int = 2) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    result = []
    for task in TASKS:
        mine = [r for r in rows if r["task"] == task]
        for r in (mine[:1] + mine[-1:])[:per_task]:
            result.append({**r, "answer": bench.answer(r["prompt"])})
    return result


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def training_facts(state_path: Path) -> dict[str, Any]:
    state = torch.load(state_path, map_location="cpu", weights_only=False)
    keys = ("shape", "step", "tokens", "elapsed", "threads", "device", "epochs", "arguments")
    facts = {k: state[k] for k in keys}
    facts["parameters"] = sum(v.numel() for v in state["model"].values())
    facts["tokens_per_s"] = state["tokens"] / state["elapsed"]
    facts["history"] = [h for i, h in enumerate(state["history"]) if i % 4 == 3 or h is state["history"][-1]]
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--state", type=Path, help="the --out folder of training.train, for its facts")
    parser.add_argument("--note", default="", help="what the card should say of this run beside its settings")
    parser.add_argument("--nano", type=Path, default=Path("src/emoe/nano"))
    parser.add_argument("--results", type=Path, default=Path("training/results.json"))
    parser.add_argument("--most", type=int, default=200, help="held-out prompts per task")
    args = parser.parse_args()
    examples = load(args.data)
    bench = Bench(args.nano / "checkpoint", examples)
    results: dict[str, Any] = {
        "note": args.note,
        "training": training_facts(args.state / "state.pt") if args.state else None,
        "examples": {
            t: {
                "train": sum(e.task == t and not e.held_out for e in examples),
                "held_out": len(bench.sides[t, True]),
            }
            for t in TASKS
        },
        "quality": quality(bench, args.most),
        "routing": routing(bench, min(60, args.most // 2)),
        "accuracy": accuracy(bench, args.most),
        "answers": examples_of(bench, args.nano / "prompts.jsonl"),
        "rerouting": rerouting(bench, min(40, args.most // 4)),
    }
    args.results.write_text(json.dumps(rounded(results), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
