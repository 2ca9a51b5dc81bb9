"""One part of bench/gpu.py, in a process that may fail: copies, a check, or rows of a shape. Prints JSON objects."""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import emoe
from emoe.bench.prompts import prompt_ids
from emoe.model import close, placement
from emoe.residency.devices import device_at
from emoe.residency.transfers import copy_seconds
from emoe.residency.virtual import VirtualDevice

RESULT = "RESULT "
"""Begins the lines that are results."""

WAITED = "called a synchronizing CUDA operation"
"""What torch says of a call that waits; once in a process it also says that this is a prototype."""

CHECKED = (96, 24)
"""Tokens of a checked sequence: read as a prompt, and then one by one."""


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what",
        nargs="+",
        help="`copy BYTES...`, `check CHECKPOINT BUDGET` or `rows CHECKPOINT WAY...`, WAY as BUDGET:HOST:ON_MISS",
    )
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--pinned-gb-s", type=float, default=0.0, help="the link's bandwidth; 0: not known")
    parser.add_argument("--virtual", action="store_true")
    args = parser.parse_args()
    if args.virtual:
        use_virtual()
    for found in work(args, args.what):
        print(RESULT + json.dumps(found), flush=True)
    return 0


def use_virtual() -> None:
    """Put experts on a virtual device of this process."""
    placement.device_at = lambda place: VirtualDevice(2e10)  # type: ignore[assignment]


class Measured:
    """What is measured in a process that may fail."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.place = torch.device("cpu" if args.virtual else "cuda")

    def copy(self, nbytes: int) -> dict[str, Any]:
        """One size of copy, from pinned and from pageable memory."""
        device = VirtualDevice(2e10) if self.args.virtual else device_at(self.place)
        target, held = device.bank(nbytes), device.host(nbytes)
        pinned = nbytes / copy_seconds(device, held.memory, target, 9) / 1e9
        pageable = nbytes / copy_seconds(device, torch.zeros(nbytes, dtype=torch.uint8), target, 9) / 1e9
        device.free_host(held)
        return {"nbytes": nbytes, "pinned": pinned, "pageable": pageable, "notice": held.notice}

    def check(self, path: Path, budget: int) -> dict[str, Any]:
        """Logits of one sequence: with `budget` % of the experts those of the whole model, bit for bit, and near to
        transformers' own, by the norm of the difference over their norm, position by position.
        """
        plain = AutoModelForCausalLM.from_pretrained(path, dtype="auto", experts_implementation="eager")
        theirs = self.logits(plain.to(self.place).eval(), path)
        del plain
        ours = []
        for share in (None, f"{budget}%"):
            model, _ = emoe.load(path, device_map=str(self.place), expert_memory=share)
            try:
                ours.append(self.logits(model, path))
            finally:
                close(model)
            del model
        whole, part = ours
        errors = (whole.float() - theirs.float()).norm(dim=-1) / theirs.float().norm(dim=-1)
        return {
            "budget": budget,
            "equal": torch.equal(whole, part),
            "other_positions": int((whole != part).any(dim=-1).sum()),
            "median_error": float(errors.median()),
            "worst_error": float(errors.max()),
            "same_choice": float((whole.argmax(-1) == theirs.argmax(-1)).float().mean()),
        }

    @torch.inference_mode()
    def logits(self, model: Any, path: Path) -> torch.Tensor:
        """[positions, vocabulary] of a sequence that is given: nothing is chosen, so nothing runs away."""
        prompt, steps = CHECKED
        ids = torch.tensor([prompt_ids(path, 7, prompt + steps)], device=self.place)
        out = model(input_ids=ids[:, :prompt], use_cache=True)
        found = [out.logits[0]]
        for at in range(prompt, prompt + steps):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[0])
        return torch.cat(found).cpu()

    def row(self, path: Path, budget: int, host: str, on_miss: str) -> dict[str, Any]:
        """Load, warm up, measure; medians over rounds."""
        if not self.args.virtual:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model, _ = emoe.load(
            path,
            device_map=str(self.place),
            expert_memory=None if budget == 100 else f"{budget}%",
            host_memory=host,
            on_miss=on_miss,  # type: ignore[arg-type]
        )
        loaded_s = time.perf_counter() - start
        try:
            waits = self.generate(model, path, -1, count=True)["waits"]
            samples = [self.generate(model, path, number) for number in range(self.args.rounds)]
            stats = emoe.stats(model)
        finally:
            close(model)
        decodes = [sample["decode"] for sample in samples]
        steps = max(1, self.args.new_tokens - 1)
        link_s = 0.0
        if self.args.pinned_gb_s:
            link_s = sum(d["bytes_copied"] for d in decodes) / (self.args.pinned_gb_s * 1e9)
        hits, misses = sum(d["hits"] for d in decodes), sum(d["misses"] for d in decodes)
        return {
            "loaded_s": loaded_s,
            "tokens": [token for sample in samples for token in sample["tokens"]],
            "logits": [sample["logits"] for sample in samples],
            "ttft_s": statistics.median(sample["ttft_s"] for sample in samples),
            "tokens_per_s": statistics.median(steps / sample["decode_s"] for sample in samples),
            "miss_rate": misses / max(1, hits + misses),
            "copied_per_token": sum(d["bytes_copied"] for d in decodes) / len(decodes) / steps,
            "read_per_token": sum(d["bytes_read"] for d in decodes) / len(decodes) / steps,
            "link_share": link_s / sum(sample["decode_s"] for sample in samples),
            "waits_per_token": waits / steps,
            "device_bytes": 0 if self.args.virtual else torch.cuda.max_memory_allocated(),
            "stats": {name: stats[name] for name in ("host", "hybrid", "slot_kernels", "reader", "reader_reason")},
        }

    @torch.inference_mode()
    def generate(self, model: Any, path: Path, number: int, *, count: bool = False) -> dict[str, Any]:
        """Read a prompt, decode greedily; `count` what waits for the device, which takes time itself."""
        ids = torch.tensor([prompt_ids(path, number % 97, self.args.prompt_tokens)], device=self.place)
        self.synchronise()
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        logits = [out.logits[0, -1]]
        tokens = [logits[-1].argmax()]
        self.synchronise()
        ttft_s = time.perf_counter() - start
        before = emoe.stats(model)
        with counted_waits(count and not self.args.virtual) as waits:
            start = time.perf_counter()
            for _ in range(self.args.new_tokens - 1):
                out = model(input_ids=tokens[-1].view(1, 1), past_key_values=out.past_key_values, use_cache=True)
                logits.append(out.logits[0, -1])
                tokens.append(logits[-1].argmax())
            self.synchronise()
            decode_s = time.perf_counter() - start
        after = emoe.stats(model)
        names = ("hits", "misses", "loads", "bytes_read", "bytes_copied", "synchronisations")
        return {
            "ttft_s": ttft_s,
            "decode_s": decode_s,
            "tokens": torch.stack(tokens).tolist(),
            "logits": hashlib.sha256(torch.stack(logits).cpu().view(torch.uint8).numpy().tobytes()).hexdigest(),
            "decode": {name: after[name] - before[name] for name in names},
            "waits": waits() + after["synchronisations"] - before["synchronisations"],
        }

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.place.type == "cuda":
            torch.cuda.synchronize()


def work(args: argparse.Namespace, what: list[str]) -> Iterator[dict[str, Any]]:
    """One part, as `main` describes it."""
    measured = Measured(args)
    if what[0] == "copy":
        for nbytes in what[1:]:
            yield measured.copy(int(nbytes))
        return
    if what[0] == "check":
        yield measured.check(Path(what[1]), int(what[2]))
        return
    for way in what[2:]:
        budget, host, on_miss = way.split(":")
        yield measured.row(Path(what[1]), int(budget), host, on_miss)


@contextmanager
def counted_waits(count: bool) -> Iterator[Callable[[], int]]:
    """Count the calls of torch's that wait for the device; emoe's own waits are in its stats."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if count:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum(WAITED in str(warning.message) for warning in caught)
        finally:
            if count:
                torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    raise SystemExit(main())
