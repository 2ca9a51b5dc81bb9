"""`emoe demo`: one prompt per task with all experts, then twice with a share of them, exactly and lossily."""

from __future__ import annotations

import argparse
import shutil
import statistics
import textwrap
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emoe.cli.options import add_command, add_json, add_loading, add_model, expert_memory, positive
from emoe.cli.output import note, print_json, table
from emoe.config import ExpertMemory, Mode, format_bytes

if TYPE_CHECKING:
    from emoe.cli.session import Answer, Session

PROMPT_CHARACTERS = 160  # of a prompt, as shown


@dataclass(frozen=True, slots=True)
class Way:
    """One of the ways to run that are compared."""

    name: str
    memory: ExpertMemory | None
    mode: Mode


@dataclass(frozen=True, slots=True)
class Result:
    """One prompt run one way; the numbers are this prompt's alone."""

    task: str
    way: str
    answer: Answer
    resident_bytes: int
    hit_rate: float
    rerouted_share: float
    bytes_read: int
    identical: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "task": self.task,
            "run": self.way,
            "resident_bytes": self.resident_bytes,
            "hit_rate": round(self.hit_rate, 4),
            "rerouted_share": round(self.rerouted_share, 4),
            "bytes_read": self.bytes_read,
            "identical": self.identical,
        } | self.answer.as_dict()


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "demo",
        run,
        "Answer one prompt per task with all experts, and with a share of them in two modes.",
    )
    add_model(parser)
    parser.add_argument(
        "--expert-memory",
        type=expert_memory,
        default=ExpertMemory("share", 0.4),
        metavar="SIZE",
        help="the budget to compare with everything resident (default: 40%%)",
    )
    parser.add_argument(
        "-n",
        "--max-new-tokens",
        type=positive,
        default=48,
        metavar="N",
        help="tokens of an answer (default: 48)",
    )
    parser.add_argument("--prompts", type=positive, default=1, metavar="N", help="prompts per task (default: 1)")
    parser.add_argument(
        "-t", "--threads", type=positive, metavar="N", help="CPU threads (default: torch's; 1 for emoe-nano)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print a plan, the answers of every way, and what they cost."""
    from emoe import nano
    from emoe.cli.plan import plan_text
    from emoe.cli.session import open_session, warn_if_lossy
    from emoe.planner import plan

    memory: ExpertMemory = args.expert_memory
    dtype = None if args.dtype == "auto" else args.dtype
    made = plan(args.model, expert_memory=memory, dtype=dtype, revision=args.revision)
    if not args.json:
        print(f"{plan_text(made)}\n")
    ways = (
        Way("all experts", None, "exact"),
        Way(f"exact, {memory}", memory, "exact"),
        Way(f"resident, {memory}", memory, "resident"),
    )
    prompts = _choose(nano.prompts(), args.prompts)
    results: list[Result] = []
    with ExitStack() as stack:
        sessions = []
        for way in ways:
            loading = argparse.Namespace(**_usual_loading() | vars(args) | {"mode": way.mode})
            sessions.append(stack.enter_context(open_session(loading, expert_memory=way.memory)))
        import torch

        threads = torch.get_num_threads()
        note(f"{threads} thread{'s' * (threads > 1)}; the ways take turns on every prompt; greedy decoding")
        warn_if_lossy(sessions[-1].stats)
        for session in sessions:  # the first call of each pays for allocations that later ones do not
            session.generate(session.encode("Hello."), show=False, max_new_tokens=4, do_sample=False)
        for prompt in prompts:
            rows = _run_prompt(prompt, ways, sessions, args.max_new_tokens)
            results += rows
            if not args.json:
                print(_prompt_text(prompt, rows), flush=True)
    summary = _summary(results)
    if args.json:
        print_json(
            {
                "plan": made.as_dict(),
                "threads": torch.get_num_threads(),
                "prompts": [result.as_dict() for result in results],
                "summary": summary,
            }
        )
    else:
        print(_summary_text(summary, made.expert_bytes))
    return 0


def _choose(prompts: list[dict[str, str]], each: int) -> list[dict[str, str]]:
    """The first `each` prompts of every task."""
    seen: dict[str, int] = {}
    chosen = []
    for prompt in prompts:
        seen[prompt["task"]] = seen.get(prompt["task"], 0) + 1
        if seen[prompt["task"]] <= each:
            chosen.append(prompt)
    return chosen


def _run_prompt(
    prompt: dict[str, str], ways: tuple[Way, ...], sessions: list[Session], max_new_tokens: int
) -> list[Result]:
    """One prompt, every way in turn."""
    rows: list[Result] = []
    for way, session in zip(ways, sessions, strict=True):
        before = session.stats
        ids = session.encode(prompt["prompt"])
        answer = session.generate(ids, show=False, max_new_tokens=max_new_tokens, do_sample=False)
        after = session.stats
        if answer.stopped:
            raise KeyboardInterrupt
        delta = {name: after[name] - before[name] for name in _COUNTERS}
        routed = delta["hits"] + delta["misses"]
        rows.append(
            Result(
                task=prompt["task"],
                way=way.name,
                answer=answer,
                resident_bytes=after["resident_bytes"],
                hit_rate=delta["hits"] / routed if routed else 1.0,
                rerouted_share=delta["rerouted_tokens"] / delta["routed_tokens"] if delta["routed_tokens"] else 0.0,
                bytes_read=delta["bytes_read"],
                identical=not rows or answer.ids == rows[0].answer.ids,
            )
        )
    return rows


_COUNTERS = ("hits", "misses", "rerouted_tokens", "routed_tokens", "bytes_read")


def _prompt_text(prompt: dict[str, str], rows: list[Result]) -> str:
    """A prompt, the figures of each way, and the answers that differ."""
    width = max(60, min(shutil.get_terminal_size().columns, 110))
    shown = textwrap.shorten(prompt["prompt"], PROMPT_CHARACTERS, placeholder=" …")
    lines = [
        textwrap.fill(f"[{prompt['task']}] {shown}", width),
        table([_HEADER, *(_row(result, result is rows[0]) for result in rows)], right=(1, 2, 3, 4)),
    ]
    for result in rows:
        if not result.identical or result is rows[0]:
            text = " ".join(result.answer.text.split()) or "(nothing)"
            lines.append(textwrap.fill(f"{result.way}: {text}", width, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(lines) + "\n"


_HEADER = ("", "experts in memory", "hits", "rerouted", "tokens/s", "text")


def _row(result: Result, reference: bool) -> tuple[str, ...]:
    rate = result.answer.decode_tokens_per_s
    return (
        result.way,
        format_bytes(result.resident_bytes),
        f"{result.hit_rate:.1%}",
        f"{result.rerouted_share:.1%}",
        "-" if rate is None else f"{rate:.0f}",
        "(reference)" if reference else "identical" if result.identical else "differs",
    )


def _summary(results: list[Result]) -> list[dict[str, Any]]:
    """What each way took over all prompts. Medians, because the first prompts of a run are slower."""
    summary = []
    for way in dict.fromkeys(result.way for result in results):
        rows = [result for result in results if result.way == way]
        rates = [rate for row in rows if (rate := row.answer.decode_tokens_per_s) is not None]
        summary.append(
            {
                "run": way,
                "resident_bytes": max(row.resident_bytes for row in rows),
                "hit_rate": round(statistics.fmean(row.hit_rate for row in rows), 4),
                "rerouted_share": round(statistics.fmean(row.rerouted_share for row in rows), 4),
                "bytes_read": sum(row.bytes_read for row in rows),
                "decode_tokens_per_s": round(statistics.median(rates), 2) if rates else None,
                "time_to_first_token_s": round(statistics.median(row.answer.first_token_s for row in rows), 4),
                "identical": sum(row.identical for row in rows),
                "prompts": len(rows),
            }
        )
    return summary


_LEGEND = (
    "hits: chosen experts that were in memory. Others are read first (mode exact), or their tokens go to another\n"
    "expert (rerouted, mode resident). same text: as with all experts."
)


def _summary_text(summary: list[dict[str, Any]], expert_bytes: int) -> str:
    rows = [("", "experts in memory", "of all", "hits", "rerouted", "first token", "tokens/s", "same text")]
    for way in summary:
        rate = way["decode_tokens_per_s"]
        rows.append(
            (
                way["run"],
                format_bytes(way["resident_bytes"]),
                f"{way['resident_bytes'] / expert_bytes:.0%}",
                f"{way['hit_rate']:.1%}",
                f"{way['rerouted_share']:.1%}",
                f"{way['time_to_first_token_s'] * 1000:.0f} ms",
                "-" if rate is None else f"{rate:.0f}",
                f"{way['identical']} of {way['prompts']}",
            )
        )
    shown = table(rows, right=(1, 2, 3, 4, 5, 6, 7))
    return f"All prompts (medians of times and rates)\n{shown}\n\n{_LEGEND}"


def _usual_loading() -> dict[str, Any]:
    """What the demo does not let one choose."""
    parser = argparse.ArgumentParser()
    add_loading(parser)
    return vars(parser.parse_args([]))
