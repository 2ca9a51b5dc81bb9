"""`emoe profile`: learn a model's habits from prompts, once, into a directory that later runs use."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from emoe.bench.options import seed
from emoe.cli.early import refuse_early
from emoe.cli.options import READERS, add_command, add_expert_dtype, add_json, add_model, expert_memory, positive
from emoe.cli.output import REDRAW_S, REPORT_S, clock, print_json, table
from emoe.errors import UsageError

if TYPE_CHECKING:
    from emoe.tasks.profile import Profile

MEASURES = ("auto", "similarity", "agreement", "perplexity")


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "profile", run, "Learn a model's tasks, popular experts, answer lengths, sensitivity and speed."
    )
    add_model(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines: {"task", "prompt" or "messages"[, "reference"]}',
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the profile (default: MODEL-profile)")
    parser.add_argument("--quick", action="store_true", help="few prompts, short answers: to try it out")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument(
        "-n",
        "--max-new-tokens",
        type=positive,
        default=200,
        metavar="N",
        help="tokens of an answer at most (default: 200)",
    )
    parser.add_argument(
        "--sensitivity-prompts",
        type=_count,
        default=8,
        metavar="N",
        help="prompts of each task that are answered under random routing (default: 8; 0: none)",
    )
    parser.add_argument(
        "--prefixes",
        type=positive,
        default=12,
        metavar="N",
        help="numbers of randomly routed layers to try at most (default: 12)",
    )
    parser.add_argument(
        "--measure",
        choices=MEASURES,
        default="auto",
        help="what decides how sensitive a layer is (default: similarity where it is installed, else agreement)",
    )
    parser.add_argument(
        "--predictors", metavar="NAMES", help="predictors to train, separated by commas, or none (default: the best)"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the random routing and the training")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the sensitivity, too (.png, .svg, .pdf)")
    parser.add_argument(
        "--expert-memory",
        type=expert_memory,
        metavar="SIZE",
        help="memory for experts meanwhile (default: all of them)",
    )
    add_expert_dtype(parser)
    parser.add_argument("--reader", choices=READERS, default="auto", help="how experts are read from disk")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "-t", "--threads", type=positive, metavar="N", help="CPU threads (default: torch's; 1 for emoe-nano)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Make the profile. What can be refused is refused before the model is loaded."""
    start = time.monotonic()
    refuse_early(args.model, args.expert_memory, args.expert_dtype)
    from emoe.profiling.plot import check_plot, plot_sensitivity
    from emoe.profiling.prompts import first_of_each, read_prompts
    from emoe.profiling.settings import QUICK_PROMPTS, ProfileSettings, check_out, check_settings
    from emoe.profiling.training import default_names

    name = args.model or "emoe-nano"
    out = args.out or Path(f"{Path(name).name}-profile")
    prompts = read_prompts(args.prompts)
    settings = ProfileSettings(
        new_tokens=args.max_new_tokens,
        sensitivity_prompts=args.sensitivity_prompts,
        prefixes=args.prefixes,
        measure=args.measure,
        predictors=default_names() if args.predictors is None else _names(args.predictors),
        seed=args.seed,
    )
    if args.quick:
        settings = settings.quick()
        prompts = [prompts[i] for i in first_of_each(prompts, QUICK_PROMPTS)]
    settings = check_settings(settings)
    if args.plot is not None:
        if not settings.sensitivity_prompts:
            raise UsageError("--plot draws the sensitivity, which --sensitivity-prompts 0 leaves out")
        check_plot(args.plot)
    check_out(out, args.resume)

    model, tokenizer = _load(args)
    from emoe.model import close
    from emoe.profiling.job import make_profile

    progress = StepLine()
    try:
        made = make_profile(
            model, tokenizer, prompts, settings, out, name=Path(name).name, step=progress.step, say=progress.say
        )
    except KeyboardInterrupt:
        progress.say(f"stopped; what is done is kept: go on with --resume, or remove {out}")
        raise
    finally:
        close(model)
    if args.plot is not None:
        plot_sensitivity(made, args.plot)
    seconds = time.monotonic() - start
    if args.json:
        print_json(_values(made, out, seconds))
    else:
        print(profile_text(made, out, seconds))
    return 0


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    import emoe
    from emoe.cli.output import ProgressLine
    from emoe.cli.session import bars_on_terminals_only, choose_threads

    bars_on_terminals_only()
    choose_threads(args.threads, args.model)
    options: dict[str, Any] = {"expert_memory": args.expert_memory, "reader": args.reader, "dtype": args.dtype}
    options |= {"expert_dtype": args.expert_dtype, "expert_cache": args.expert_cache}
    options["quantise_progress"] = ProgressLine("quantising experts")
    if args.revision is not None:
        options["revision"] = args.revision
    if args.trust_remote_code:
        options["trust_remote_code"] = True
    return emoe.load(args.model, progress=ProgressLine("reading experts"), **options)


def _names(text: str) -> tuple[str, ...]:
    """Predictors from a list with commas."""
    names = tuple(name.strip() for name in text.split(","))
    return () if names == ("none",) else tuple(dict.fromkeys(name for name in names if name))


def _count(text: str) -> int:
    """argparse type for a whole number of at least 0."""
    return 0 if text == "0" else positive(text)


class StepLine:
    """Stages and their time left on stderr: redrawn on a terminal, a line now and then elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._stage = ""
        self._start = (0.0, 0)
        self._shown = 0.0
        self._open = False

    def step(self, stage: str, done: int, total: int) -> None:
        """Show the state of a stage, if it is time to, or everything is done."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._start = stage, (now, done)
            self._shown = 0.0 if self._terminal else now
        finished = done >= total
        if not finished and now - self._shown < (REDRAW_S if self._terminal else REPORT_S):
            return
        self._shown = now
        seconds, since = now - self._start[0], done - self._start[1]
        line = f"{stage}: {done} of {total}"
        if finished:
            line += f" in {clock(seconds)}"
        elif since:
            line += f", {clock(seconds / since * (total - done))} left"
        if self._terminal:
            print(f"\r\x1b[Kemoe: {line}", end="\n" if finished else "", file=self._stream, flush=True)
            self._open = not finished
        else:
            print(f"emoe: {line}", file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._open:
            print(file=self._stream)
            self._open = False
        print(f"emoe: {text}", file=self._stream, flush=True)


def profile_text(made: Profile, out: Path, seconds: float) -> str:
    """What was learned, for people."""
    known = made.sensitivity
    rows = [("task", "answer tokens", "9 of 10 within", "insensitive layers", "kept with the last of them", "keywords")]
    for task in made.tasks:
        lengths = made.lengths[task]
        cut = f" ({lengths.cut:.0%} cut)" if lengths.cut else ""
        insensitive = int((~known.sensitive(task)).sum())
        kept = f"{known.curves[known.measure][task][insensitive - 1]:.2f}" if insensitive else ""
        rows.append(
            (
                task,
                f"{lengths.mean:.0f}{cut}",
                f"{lengths.quantiles[0.9]:.0f}",
                f"{insensitive} of {known.layers}" if known.curves else "not measured",
                kept,
                ", ".join(list(made.keywords.weights.get(task, {}))[:4]),
            )
        )
    times = made.timings
    speed = [f"experts load at {times.load_bytes_per_s / 1e9:.2f} GB/s" if times.load_bytes_per_s else ""]
    speed += [f"one in {times.expert_load_s * 1e3:.2f} ms" if times.expert_load_s else ""]
    speed += [f"a token takes {times.token_s * 1e3:.1f} ms" if times.token_s else ""]
    return "\n".join(
        [
            table(rows, right=(1, 2, 3, 4)),
            "",
            f"  layers are insensitive while {known.measure} stays at {known.threshold:g} or above with random routing",
            f"  {', '.join(each for each in speed if each)} (reader {times.reader}, {times.device})",
            f"  predictors: {', '.join(made.predictors) or 'none'}",
            f"  {out} in {seconds:.0f} s",
        ]
    )


def _values(made: Profile, out: Path, seconds: float) -> dict[str, Any]:
    known = made.sensitivity
    return {
        "profile": str(out),
        "fingerprint": made.fingerprint,
        "tasks": list(made.tasks),
        "lengths": {task: lengths.as_json() for task, lengths in made.lengths.items()},
        "sensitivity": known.as_json(),
        "insensitive_layers": {task: int((~known.sensitive(task)).sum()) for task in made.tasks},
        "tokens": dict(made.tokens),
        "timings": made.timings.as_json(),
        "predictors": list(made.predictors),
        "nbytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        "seconds": round(seconds, 3),
    }
