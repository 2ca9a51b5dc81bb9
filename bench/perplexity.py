"""What int8 and int4 experts cost in quality.

    python -m bench.perplexity text   [--corpus FILE ...] [--prompts N]    emoe-nano: perplexity and answers
    python -m bench.perplexity logits --model DIR [--tokens N]             any checkpoint: its logits beside float32's

`text` reads the references of emoe-nano's held-out prompts after the prompts, and windows of the given texts (.txt or
.txt.gz; emoe-nano was not trained on any), and answers every prompt greedily: the share of answers that begin as the
reference does in the tasks with one right answer, and that are the native model's own, word for word. Every way runs at
every budget; within a form of the experts all budgets must give the same bits, which is checked.

`logits` feeds random tokens (a prompt, then single ones) and compares with the model run in float32: relative error of
the logits, Kullback-Leibler divergence, how often the likeliest token is the same, and the share of routes that are.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import emoe
from emoe import nano
from emoe.checkpoint.codecs.formats import EXPERT_DTYPES, NATIVE
from emoe.model import close
from emoe.model.bind import binding_of
from emoe.model.encoding import encode
from emoe.profiling.running import answer, judge

SHORT = ("classify", "compare", "maths")
"""Tasks with one right answer of a word or a number."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, of which those from `start` on are judged."""

    ids: list[int]
    start: int


@dataclass(slots=True)
class Sums:
    """Of judged tokens."""

    tokens: int = 0
    nll: float = 0.0
    likeliest: int = 0

    def add(self, model: Any, text: Text) -> None:
        """Judge one text in one pass."""
        wanted = text.ids[text.start :]
        likeliest, nll = judge(model, text.ids[: text.start], wanted)
        self.nll += nll
        self.likeliest += sum(a == b for a, b in zip(likeliest, wanted, strict=True))
        self.tokens += len(wanted)

    def as_row(self, name: str) -> Row:
        """Perplexity, and the share of tokens that were the likeliest."""
        return {
            f"{name}_perplexity": round(math.exp(self.nll / self.tokens), 4),
            f"{name}_accuracy": round(self.likeliest / self.tokens, 4),
            f"{name}_tokens": self.tokens,
        }


def windows(files: Sequence[Path], tokenizer: Any, count: int, length: int) -> dict[str, list[Text]]:
    """`count` windows of `length` tokens of each file, evenly spread over it; the first token of each is given."""
    found = {}
    for file in files:
        opened = gzip.open if file.suffix == ".gz" else open
        with opened(file, "rt", encoding="utf-8") as lines:
            ids = tokenizer.encode(lines.read(), add_special_tokens=False)
        last = len(ids) - length
        if last < 0:
            raise SystemExit(f"{file} has {len(ids)} tokens; give --window-tokens of at most that")
        starts = sorted({last * i // max(1, count - 1) for i in range(count)})
        found[file.name.partition(".")[0]] = [Text(ids[start : start + length], 1) for start in starts]
    return found


def references(tokenizer: Any, prompts: Sequence[dict[str, str]]) -> list[Text]:
    """Prompts with their references."""
    found = []
    for prompt in prompts:
        ids = encode(tokenizer, prompt["prompt"])
        found.append(Text([*ids, *tokenizer.encode(prompt["reference"], add_special_tokens=False)], len(ids)))
    return found


def answers(model: Any, tokenizer: Any, prompts: Sequence[dict[str, str]], tokens: int) -> list[str]:
    """Greedy answers."""
    found = []
    for prompt in prompts:
        said = answer(model, encode(tokenizer, prompt["prompt"]), tokens)
        found.append(tokenizer.decode(said.ids, skip_special_tokens=True).strip())
    return found


@torch.no_grad()
def text(args: argparse.Namespace) -> list[Row]:
    """emoe-nano in every form at every budget."""
    prompts = nano.prompts()[: args.prompts]
    right: list[str] = []
    rows: list[Row] = []
    for form in args.expert_dtypes:
        first: Row | None = None
        for budget in args.budgets:
            model, tokenizer = emoe.load(expert_memory=budget, expert_dtype=form, expert_cache=args.expert_cache)
            if tokenizer is None:
                raise SystemExit("emoe-nano has lost its tokenizer")
            start = time.perf_counter()
            judged = {"reference": references(tokenizer, prompts)}
            judged |= windows(args.corpus, tokenizer, args.windows, args.window_tokens)
            row: Row = {}
            for name, texts in judged.items():
                sums = Sums()
                for each in texts:
                    sums.add(model, each)
                row |= sums.as_row(name)
            said = answers(model, tokenizer, prompts, args.tokens)
            right = right or said
            row["same_answers"] = f"{sum(a == b for a, b in zip(said, right, strict=True))}/{len(said)}"
            short = [(a, p["reference"]) for a, p in zip(said, prompts, strict=True) if p["task"] in SHORT]
            row["right_answers"] = f"{sum(a.startswith(b.strip()) for a, b in short)}/{len(short)}"
            stats = emoe.stats(model)
            close(model)
            if first is None:
                first = row
            elif row != first:
                raise SystemExit(f"{form} experts give other figures at {budget} than at {args.budgets[0]}: a defect")
            rows.append(
                {
                    "experts": form,
                    "budget": budget,
                    "expert_mb": round(stats["total_expert_bytes"] / 1e6, 2),
                    **row,
                    "hit_rate": stats["hit_rate"],
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
            show(rows[-1:])
    return rows


@dataclass(slots=True)
class Heard:
    """The logits of a run [tokens, vocabulary], and its routes by pass and layer."""

    logits: torch.Tensor
    routes: list[torch.Tensor]


@torch.no_grad()
def run(folder: Path, ids: torch.Tensor, steps: int, **options: Any) -> Heard:
    """Feed `ids` [1, tokens]: all but the last `steps` at once, then one by one."""
    model, _ = emoe.load(folder, **options)
    routes: list[torch.Tensor] = []
    binding_of(model).runtime.observers.append(
        lambda now, layer, chosen, weights: routes.append(chosen.sort(dim=-1).values.clone())
    )
    out = model(input_ids=ids[:, : ids.shape[1] - steps], use_cache=True)
    logits = [out.logits[0].float()]
    for at in range(ids.shape[1] - steps, ids.shape[1]):
        out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0].float())
    close(model)
    return Heard(torch.cat(logits), routes)


def logits(args: argparse.Namespace) -> list[Row]:
    """Every form, run in the checkpoint's dtype and in float32, beside the native one in float32."""
    if args.model is None:
        raise SystemExit("logits needs --model DIR")
    model_config = json.loads((args.model / "config.json").read_text())
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(0, int(model_config["vocab_size"]), (1, args.tokens), generator=generator)
    options = {"expert_memory": args.budgets[0], "expert_cache": args.expert_cache}
    true = run(args.model, ids, args.steps, dtype="float32", **options)
    rows = []
    for form in args.expert_dtypes:
        for dtype in ("float32", "auto"):
            if (form, dtype) == (NATIVE, "float32"):
                continue
            found = run(args.model, ids, args.steps, dtype=dtype, expert_dtype=form, **options)
            rows.append(
                {"experts": form, "runs in": "as stored" if dtype == "auto" else dtype, **compared(found, true)}
            )
            show(rows[-1:])
    return rows


def compared(found: Heard, true: Heard) -> Row:
    """One run beside another."""
    error = (found.logits - true.logits).norm(dim=-1) / true.logits.norm(dim=-1)
    logs, true_logs = (torch.log_softmax(heard.logits, dim=-1) for heard in (found, true))
    divergence = (true_logs.exp() * (true_logs - logs)).sum(dim=-1)
    same = sum(_same_routes(a, b) for a, b in zip(found.routes, true.routes, strict=True))
    chosen = sum(route.numel() for route in true.routes)
    return {
        "median_error": round(float(error.median()), 5),
        "largest_error": round(float(error.max()), 5),
        "median_divergence": float(f"{float(divergence.median()):.3g}"),
        "same_likeliest": round(float((found.logits.argmax(-1) == true.logits.argmax(-1)).float().mean()), 4),
        "same_routes": round(same / chosen, 4),
    }


def _same_routes(a: torch.Tensor, b: torch.Tensor) -> int:
    """Chosen experts that two routes [tokens, k] share."""
    return int((a.unsqueeze(-1) == b.unsqueeze(-2)).any(dim=-1).sum())


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {"text": text, "logits": logits}


def show(rows: Sequence[Row]) -> None:
    """A line for each row."""
    for row in rows:
        print(
            "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            ),
            flush=True,
        )


def words(given: str) -> list[str]:
    """A list with commas."""
    return [word.strip() for word in given.split(",") if word.strip()]


def main() -> None:
    """Run one experiment; --json keeps the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--model", type=Path, metavar="DIR", help="the checkpoint of `logits`")
    parser.add_argument("--expert-dtypes", type=words, default=list(EXPERT_DTYPES), metavar="LIST")
    parser.add_argument("--budgets", type=words, default=["100%", "40%"], metavar="LIST", help="(default: 100%%,40%%)")
    parser.add_argument("--expert-cache", metavar="DIR", help="where quantised experts are kept (default: nowhere)")
    parser.add_argument("--corpus", type=Path, nargs="*", default=[], metavar="FILE", help="texts to read windows of")
    parser.add_argument("--windows", type=int, default=64, help="of each text (default: 64)")
    parser.add_argument("--window-tokens", type=int, default=256, help="of each window (default: 256)")
    parser.add_argument("--prompts", type=int, default=64, help="of emoe-nano's at most (default: 64)")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, or of `logits` (default: 48)")
    parser.add_argument("--steps", type=int, default=8, help="tokens that `logits` feeds one by one (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="emoe-perplexity-") as scratch:
        args.expert_cache = args.expert_cache or scratch
        rows = EXPERIMENTS[args.experiment](args)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
