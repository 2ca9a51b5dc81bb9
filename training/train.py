"""Train emoe-nano: one command, resumable, on a CPU or on a GPU when there is one.

    python -m training.train --data ../shared/data/tasks --out build/nano --minutes 95

The learning rate follows the share of the time that is used up, so the run always ends annealed and on time.
A paused process hardly uses it up: no step counts for more than six median steps."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from training.batches import Document, Mixer, encode, pack
from training.data import Example, load
from training.model import Layer, NanoMoe, Shape
from training.optimiser import Optimiser
from training.templates import TASKS, TRAIN, render
from training.threads import Threads
from training.tokenizer import train_tokenizer

BALANCE = 0.012  # Switch's loss over the whole mixed batch, mean over layers; 0.003 left dead experts
RESCUE = 0.02  # and a push for experts under RESCUE_BELOW of an equal share
RESCUE_BELOW = 0.45


def schedule(progress: float) -> float:
    """Warm up for 1 %, hold until half of the time, then fall in a straight line."""
    return min(1.0, progress / 0.01 + 0.05, max(0.02, (1.0 - progress) / 0.5))


def balance_losses(probs: list[Tensor], chosen: list[Tensor], real: int) -> tuple[Tensor, Tensor]:
    """-> the loss, and each layer's smallest share x experts. Padding, at the end, is not counted."""
    total = probs[0].new_zeros(())
    smallest = []
    for p, c in zip(probs, chosen, strict=True):
        experts = p.shape[1]
        share = torch.bincount(c[:real].reshape(-1), minlength=experts).to(p.dtype) / c[:real].numel()
        mean = p[:real].mean(0)
        starved = (RESCUE_BELOW - experts * share).clamp_min(0)
        total = total + BALANCE * experts * (share * mean).sum() - RESCUE * (starved * mean.clamp_min(1e-6).log()).sum()
        smallest.append(share.min() * experts)
    return total / len(probs), torch.stack(smallest)


def held_out_documents(examples: list[Example], tokenizer: Any, most: int) -> list[Document]:
    documents = []
    for task in TASKS:
        mine = sorted((e for e in examples if e.held_out and e.task == task), key=lambda e: e.key)[:most]
        for i, e in enumerate(mine):
            documents.append(encode(tokenizer, task, render(task, e.fields, i % len(TRAIN[task])), e.answer))
    return documents


@torch.no_grad()
def held_out_figures(model: NanoMoe, documents: list[Document], size: int, device: torch.device) -> dict[str, Any]:
    model.eval()
    nll, count = torch.zeros(len(TASKS)), torch.zeros(len(TASKS))
    used = torch.zeros(model.shape.layers, model.shape.experts)
    queue = list(documents)
    while queue:
        part: list[Document] = []
        while queue and sum(len(d.ids) for d in part) + len(queue[0].ids) <= size:
            part.append(queue.pop(0))
        batch = pack(part, size, device, TASKS)
        hidden, _, chosen = model(batch.ids, batch.buckets)
        _, losses = model.loss_sum(hidden, batch.targets, batch.weights)
        for i in range(len(TASKS)):
            mask = batch.answer & (batch.task == i)
            nll[i] += losses[mask].sum().cpu()
            count[i] += mask.sum().cpu()
        for layer, c in enumerate(chosen):
            used[layer] += torch.bincount(c[: batch.tokens].reshape(-1), minlength=model.shape.experts).cpu()
    model.train()
    ppl = (nll / count).exp()
    smallest = (used / used.sum(1, keepdim=True) * model.shape.experts).min(1).values
    return {
        "perplexity": {t: round(float(p), 2) for t, p in zip(TASKS, ppl, strict=True)},
        "smallest_share": [round(float(s), 2) for s in smallest],
    }


def save(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=95.0)
    parser.add_argument("--batch", type=int, default=4096, help="tokens per step")
    parser.add_argument("--threads", type=int, default=0, help="0: the machine's cores less those busy elsewhere")
    parser.add_argument("--muon-lr", type=float, default=0.015)
    parser.add_argument("--adam-lr", type=float, default=0.0025)
    parser.add_argument("--decay", type=float, default=0.15)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    crowd = Threads(torch.get_num_threads())
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (args.out / "train.pid").write_text(str(os.getpid()))

    examples = load(args.data)
    state_path = args.out / "state.pt"
    resume = args.resume and state_path.exists()
    if resume:
        tokenizer = AutoTokenizer.from_pretrained(args.out / "tokenizer")
    else:
        tokenizer = train_tokenizer(examples)
        tokenizer.save_pretrained(args.out / "tokenizer")
    shape = Shape(vocab=len(tokenizer))
    model = NanoMoe(shape).to(device).train()
    model.dropout = args.dropout
    mixer = Mixer(examples, tokenizer, args.batch, args.seed)
    documents = held_out_documents(examples, tokenizer, 48)
    optimiser = Optimiser(model, args.muon_lr, args.adam_lr, args.decay)
    step, tokens, elapsed, history = 0, 0, 0.0, []
    if resume:
        state = torch.load(state_path, map_location=device, weights_only=False)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        mixer.restore(state["mixer"])
        torch.set_rng_state(state["rng"].cpu())
        step, tokens, elapsed, history = state["step"], state["tokens"], state["elapsed"], state["history"]
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.compile_parts()

    settings = {k: str(v) for k, v in vars(args).items() if k not in ("data", "out", "resume")}

    def checkpoint() -> None:
        save(state_path, {
            "shape": shape.as_dict(), "model": model.state_dict(), "optimiser": optimiser.state_dict(),
            "mixer": mixer.state(), "rng": torch.get_rng_state(), "step": step, "tokens": tokens,
            "elapsed": elapsed, "history": history, "threads": crowd.most, "device": str(device),
            "epochs": mixer.epochs(), "arguments": settings,
        })  # fmt: skip

    stop = False

    def on_signal(*_: Any) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    recent: list[float] = []
    budget, saved = args.minutes * 60, elapsed
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {torch.get_num_threads()} threads, {device}", flush=True)
    while elapsed < budget and not stop:
        began = time.monotonic()
        if not args.threads and device.type == "cpu":
            crowd.adapt()
        batch = pack(mixer.next(), args.batch, device)
        hidden, probs, chosen = model(batch.ids, batch.buckets)
        loss, losses = model.loss_sum(hidden, batch.targets, batch.weights / batch.weights.sum())
        balance, smallest = balance_losses(probs, chosen, batch.tokens)
        torch.autograd.backward(loss + balance)
        optimiser.step(schedule(elapsed / budget))
        step, tokens = step + 1, tokens + batch.tokens
        if step % 20 == 0:
            answer = float(losses[batch.answer].mean())
            rate = args.batch / statistics.median(recent[-50:] or [1.0])
            print(
                f"step {step} tokens {tokens / 1e6:.2f}M min {elapsed / 60:.1f} "
                f"lr {schedule(elapsed / budget):.3f} loss {float(loss.detach()):.3f} "
                f"answer ppl {math.exp(min(answer, 20)):.2f} "
                f"smallest {' '.join(f'{float(s):.2f}' for s in smallest)} tok/s {rate:.0f} "
                f"threads {torch.get_num_threads()}",
                flush=True,
            )
        if step % 400 == 0:
            figures = held_out_figures(model, documents, args.batch, device)
            history.append({"step": step, "tokens": tokens, "minutes": round(elapsed / 60, 1), **figures})
            print("held out", json.dumps(history[-1]), flush=True)
        took = time.monotonic() - began
        if len(recent) >= 5:
            took = min(took, 6 * statistics.median(recent))
        recent = [*recent[-200:], took]
        elapsed += took
        if elapsed - saved > 180 or step == 30:
            checkpoint()
            saved = elapsed
    history.append({"step": step, "tokens": tokens, **held_out_figures(model, documents, args.batch, device)})
    checkpoint()
    print("done" if not stop else "stopped", json.dumps(history[-1]), json.dumps(mixer.epochs()), flush=True)


if __name__ == "__main__":
    main()
