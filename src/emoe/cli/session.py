"""A loaded model as the commands use it: notes, streaming with times, a Ctrl-C that stops cleanly."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import transformers
from transformers import StoppingCriteria, TextStreamer

import emoe
from emoe.checkpoint.codecs.formats import NATIVE
from emoe.cli.output import ProgressLine, lossy_experts, note
from emoe.config import format_bytes
from emoe.errors import UsageError
from emoe.model import close
from emoe.model.bind import binding_of
from emoe.model.encoding import encode

DEFAULT_NEW_TOKENS = 256


@dataclass
class Answer:
    """One generated answer and what it took. Times are seconds from the call."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_s: float = 0.0
    seconds: float = 0.0
    stopped: bool = False

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first, per second after the first; None with fewer than two."""
        if self.new_tokens < 2 or self.seconds <= self.first_token_s:
            return None
        return (self.new_tokens - 1) / (self.seconds - self.first_token_s)

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "time_to_first_token_s": round(self.first_token_s, 4),
            "decode_tokens_per_s": self.decode_tokens_per_s and round(self.decode_tokens_per_s, 2),
            "seconds": round(self.seconds, 4),
            "stopped": self.stopped,
        }


class Session:
    """A model, its tokenizer and how to ask it. Use it as a context manager: it ends the loader threads."""

    def __init__(self, model: Any, tokenizer: Any, name: str, trace: str | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self._trace = trace

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        close(self.model)
        if self._trace is not None:
            note(f"the routing is recorded in {self._trace}")

    @property
    def stats(self) -> dict[str, Any]:
        """emoe.stats of the model."""
        return emoe.stats(self.model)

    @property
    def context(self) -> int | None:
        """The longest sequence the model was made for, where it says so."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    def encode(self, prompt: str | Sequence[dict[str, str]], raw: bool = False) -> list[int]:
        """Token ids of a prompt or conversation, in the chat template unless `raw` or there is none."""
        return encode(self.tokenizer, prompt, raw=raw, name=self.name)

    def generate(self, ids: Sequence[int], *, show: bool = True, seed: int | None = None, **options: Any) -> Answer:
        """Answer the prompt `ids`, streaming the text to stdout when `show`. Ctrl-C stops after the current
        token.

        `options` go to transformers' generate(). Raises UsageError for a prompt the model has no room for.
        """
        if not ids:
            raise UsageError("the prompt is empty")
        if seed is not None:
            transformers.set_seed(seed)
        options["max_new_tokens"] = self._new_tokens(len(ids), options.get("max_new_tokens"))
        answer = Answer(prompt_tokens=len(ids))
        stream = _Stream(self.tokenizer, answer, show)
        device = self.model.get_input_embeddings().weight.device
        tokens = torch.tensor([list(ids)], device=device)
        with stop_on_interrupt() as interrupt:
            output = self.model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                streamer=stream,
                stopping_criteria=[interrupt],
                **options,
            )
            answer.stopped = interrupt.requested
        answer.ids = output[0].tolist()
        answer.text = self.tokenizer.decode(answer.ids[len(ids) :], skip_special_tokens=True)
        return answer

    def _new_tokens(self, prompt_tokens: int, wanted: int | None) -> int:
        """How long the answer may become: what was asked for, within the model's context."""
        if wanted is None:
            wanted = self.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
        if self.context is None:
            return int(wanted)
        room = self.context - prompt_tokens
        if room < 1:
            raise UsageError(
                f"the prompt has {prompt_tokens} tokens, and {self.name} was made for {self.context} in all; shorten it"
            )
        if room < wanted:
            note(f"the answer ends after {room} tokens at the latest: {self.name} was made for {self.context} in all")
        return min(int(wanted), room)


class _Stream(TextStreamer):  # type: ignore[misc]
    """Prints tokens as they come and keeps the times."""

    def __init__(self, tokenizer: Any, answer: Answer, show: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._answer = answer
        self._show = show
        self._start = time.perf_counter()
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Take the prompt first, then one token at a time."""
        if self._prompt_seen:
            self._answer.seconds = time.perf_counter() - self._start
            self._answer.new_tokens += 1
            if self._answer.new_tokens == 1:
                self._answer.first_token_s = self._answer.seconds
        self._prompt_seen = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print finished text at once."""
        if self._show:
            print(text, end="\n" if stream_end else "", flush=True)


class Interrupt(StoppingCriteria):  # type: ignore[misc]
    """Asks generation to end after the current token."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Whether to stop, for each sequence."""
        return torch.full((input_ids.shape[0],), self.requested, device=input_ids.device, dtype=torch.bool)


@contextmanager
def stop_on_interrupt() -> Iterator[Interrupt]:
    """The first Ctrl-C ends the answer after its token, leaving nothing half-made; the second leaves."""
    interrupt = Interrupt()

    def request(signum: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


def open_session(args: argparse.Namespace, **overrides: Any) -> Session:
    """Load the model that a command's options describe. `overrides` replace emoe.load's keywords."""
    looks_ahead = args.predictor is not None or args.mode == "balanced"
    if args.task is not None and args.trace is None and not looks_ahead:
        raise UsageError(
            "--task is for recorded prompts and for what looks ahead: give --trace FILE, --predictor NAME or "
            "--mode balanced too"
        )
    bars_on_terminals_only()
    choose_threads(args.threads, args.model)
    name = args.model or "emoe-nano"
    options: dict[str, Any] = {
        "expert_memory": args.expert_memory,
        "expert_dtype": args.expert_dtype,
        "expert_cache": args.expert_cache,
        "embeddings": args.embeddings,
        "host_memory": args.host_memory,
        "mode": args.mode,
        "on_miss": args.on_miss,
        "replan_prompts": args.replan_prompts,
        "profile": args.profile,
        "predictor": args.predictor,
        "prefetch": args.prefetch,
        "layer_split": args.layer_split,
        "sensitivity_threshold": args.sensitivity_threshold,
        "reader": args.reader,
        "eviction": args.eviction,
        "trace": args.trace,
        "task": args.task,
        "dtype": args.dtype,
        "progress": ProgressLine("reading experts"),
        "quantise_progress": ProgressLine("quantising experts"),
    }
    if args.device not in (None, "cpu"):
        options["device_map"] = args.device
    if args.expert_devices is not None:
        options |= {"expert_devices": args.expert_devices, "spread": args.spread}
    if args.revision is not None:
        options["revision"] = args.revision
    if args.trust_remote_code:
        options["trust_remote_code"] = True
    model, tokenizer = emoe.load(args.model, **options | overrides)
    return Session(model, tokenizer, name, args.trace)


def announce(session: Session) -> None:
    """Say what was loaded and how; a lossy mode is always named."""
    s = session.stats
    note(
        f"{session.name}: {format_bytes(s['budget_bytes'])} for experts of "
        f"{format_bytes(s['total_expert_bytes'])}{'' if s['expert_dtype'] == NATIVE else ' as ' + s['expert_dtype']}, "
        f"{s['slots']} slots; reader {s['reader']}: {s['reader_reason']}"
    )
    table = s["embeddings"]
    if table["place"] == "disk":
        note(
            f"the input embedding stays on disk ({table['reason']}): {format_bytes(table['bytes_spared'])} less in "
            "memory"
        )
    host = s["host"]
    if host is not None:
        note(
            f"on {', '.join(s['devices'])}, beside {format_bytes(host['slots_bytes'])} of host memory for experts"
            + (f"; {host['notice']}" if host["notice"] else "")
        )
    if s["spread"]:
        note(f"experts {s['spread']}")
    if s["hybrid"] is not None:
        note(f"HYBRID: {s['hybrid']['label']}, so the last bits can differ from a run to the next")
    _say_unknown_task(session.model)
    warn_if_lossy(s)


def _say_unknown_task(model: Any) -> None:
    """A misspelt label would otherwise pass for a task that nothing is known of."""
    binding = binding_of(model)
    task, profile = binding.runtime.task, binding.ahead.profile
    if task is not None and profile is not None and task not in profile.tasks:
        note(f"the profile knows no task {task!r}, so nothing is known of it; it knows {', '.join(profile.tasks)}")


def warn_if_lossy(stats: dict[str, Any]) -> None:
    """A line for each reason, that no option silences."""
    if stats["expert_dtype"] != NATIVE:
        note(f"LOSSY: {lossy_experts(stats['expert_dtype'])}{'' if stats['reroutes'] else '; routes are exact'}")
    if stats["reroutes"]:
        where = " in layers where the task tolerates it" if stats["mode"] == "balanced" else ""
        note(
            f"LOSSY: in mode {stats['mode']!r} tokens go to resident experts instead of the chosen ones{where}, so the "
            "text can differ from the full model's"
        )


def figures(answer: Answer, stats: dict[str, Any]) -> str:
    """One line about an answer and the experts behind it."""
    rate = f"{answer.decode_tokens_per_s:.1f} tokens/s" if answer.decode_tokens_per_s else "one token"
    hits = "no routes" if stats["hit_rate"] is None else f"{stats['hit_rate']:.1%} hits"
    rerouted = f", {stats['rerouted_share']:.1%} rerouted" if stats["reroutes"] else ""
    if stats["prefetch"] is not None:
        ahead = stats["prefetch"]
        rerouted += f", {ahead['used']} of {ahead['issued']} prefetches used"
        rerouted += "" if ahead["active"] else f" ({ahead['reason']})"
    return (
        f"{answer.prompt_tokens} + {answer.new_tokens} tokens, first after {answer.first_token_s:.2f} s, "
        f"then {rate}; "
        f"{hits}{rerouted}, {format_bytes(stats['bytes_read'])} read, "
        f"{format_bytes(stats['resident_bytes'])} of experts resident"
    )


def choose_threads(asked: int | None, model: str | None) -> None:
    """Set torch's threads: those asked for, else torch's own, but one for emoe-nano.

    Its products are too small to share, and where another process takes a core torch's threads wait for each other
    at every one of them: 2.6 tokens/s with two threads on two cores of which one was busy, 250 with one.
    """
    if asked is not None:
        torch.set_num_threads(asked)
    elif model is None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def bars_on_terminals_only() -> None:
    """Keep transformers' progress bars out of logs."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
