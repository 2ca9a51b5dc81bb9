"""The command line: it parses, calls and prints. Nothing is decided here.

    emoe plan MODEL --memory 16GiB       what fits, from headers alone
    emoe generate MODEL -p "Hello"       stream an answer
    emoe chat MODEL                      talk to it
    emoe inspect MODEL                   where the experts lie, and how they would be read
    emoe demo                            the embedded model with all, and with 40 % of its experts
    emoe serve MODEL                     OpenAI's API over it
    emoe profile MODEL --prompts FILE    learn its habits, once
    emoe quantise MODEL                  int8 or int4 experts, made once (lossy)
    emoe simulate TRACE                  what each policy would have loaded, beside the best possible
    emoe roofline MODEL                  how fast this machine could run it
    emoe bench decode                    measure
    emoe reproduce all                   the paper's figures and tables, done again
    emoe info                            what a bug report needs to say of the machine

Exit codes: 0 done; 1 a defect; 2 usage; 3 damaged checkpoint; 4 unsupported model; 5 budget too small;
6 read error while running; 130 interrupted; 141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any, NoReturn

import emoe
from emoe.cli import (
    bench,
    chat,
    demo,
    generate,
    hints,
    info,
    inspect,
    plan,
    profile,
    quantise,
    reproduce,
    roofline,
    serve,
    simulate,
)
from emoe.cli.output import note
from emoe.errors import EmoeError, UsageError
from emoe.plugins import load_plugins

INTERRUPTED = 130
BROKEN_PIPE = 141

_CHOICE = re.compile(r"argument (COMMAND|BENCHMARK): invalid choice: '(.*?)' \(choose from (.*)\)")

_COMMANDS = (plan, generate, chat, inspect, demo, serve, profile, quantise, simulate, roofline, bench, reproduce, info)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error: the usage of `emoe generate` is 20 lines long."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does; short options of other tools, which are longer than a letter, are not read as one's own."""
        if self.get_default("parser") is self and (theirs := hints.foreign(args, self.format_help)):
            self.refuse(theirs)
        return super().parse_known_args(args, namespace)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Leave with 2: this command has no such options."""
        hint = hints.of_options(unknown, self.format_help())
        self.error(f"{self.prog} does not know {' '.join(unknown)}{hint and ': ' + hint}")

    def error(self, message: str) -> NoReturn:
        """Leave with 2, and with what to type instead where that is known."""
        if choice := _CHOICE.fullmatch(message):
            hint = hints.of_command(choice[2], re.findall(r"[\w-]+", choice[3]))
            message = f"there is no {choice[1].lower()} {choice[2]!r}: {hint}"
        note(f"error: {message} (`{self.prog} --help` lists what there is)")
        self.exit(UsageError.exit_code)


class _Prefix(logging.Formatter):
    """Says which package warns, as `note` does."""

    def format(self, record: logging.LogRecord) -> str:
        """Return "emoe: text"."""
        return f"{record.name.partition('.')[0]}: {super().format(record)}"


def build_parser() -> argparse.ArgumentParser:
    """The parser of `emoe` and all its commands. Each command's module adds its own."""
    parser = _Parser(
        prog="emoe",
        description="Runs Mixture-of-Experts language models in a fraction of their memory.",
        epilog="`emoe COMMAND --help` explains a command. Without MODEL the embedded emoe-nano is used.",
    )
    parser.add_argument("--version", action="version", version=f"emoe {emoe.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. argparse's own usage errors exit with 2."""
    try:
        load_plugins()  # first: some options list the names there are
    except UsageError as error:
        note(f"error: {error}")
        return error.exit_code
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return UsageError.exit_code
    if unknown:
        args.parser.refuse(unknown)
    if not args.debug:
        # Before transformers is imported: its advice on optional packages is no answer to the command.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code: int = args.run(args)
        sys.stdout.flush()  # a reader that went away shows here, not after main
    except EmoeError as error:
        if args.debug:
            raise
        note(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # `emoe inspect | head` ends here. Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def run() -> NoReturn:
    """The console script. What the terminal's encoding cannot show is shown as "?"."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if logging.lastResort is not None:  # what shows a library's warning where nothing else is set up for it
        logging.lastResort.setFormatter(_Prefix())
    sys.exit(main())
