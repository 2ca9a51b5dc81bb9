"""`emoe generate`: one prompt, one answer, streamed."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from emoe.cli.early import refuse_early, refuse_settings
from emoe.cli.options import add_command, add_json, add_loading, add_model, add_sampling, sampling
from emoe.cli.output import note, print_json
from emoe.errors import UsageError

STOPPED = 130


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "generate", run, "Answer one prompt: text streams to stdout, figures go to stderr.")
    add_model(parser)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt (default: standard input)")
    parser.add_argument("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    parser.add_argument("-q", "--quiet", action="store_true", help="no notes and figures on stderr")
    add_loading(parser)
    add_sampling(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Stream the answer. Ctrl-C stops it: exit code 130."""
    prompt = _prompt(args)
    options = sampling(args)
    refuse_settings(args)
    refuse_early(args.model, args.expert_memory, args.expert_dtype)
    from emoe.cli.session import announce, figures, open_session, warn_if_lossy

    with open_session(args) as session:
        ids = session.encode(prompt, raw=args.raw)
        if not args.quiet:
            announce(session)
        else:
            warn_if_lossy(session.stats)
        answer = session.generate(ids, show=not args.json, **options)
        stats = session.stats
    if args.json:
        print_json({"model": session.name, "prompt": prompt} | answer.as_dict() | {"stats": stats})
    elif not args.quiet:
        note(figures(answer, stats))
    return STOPPED if answer.stopped else 0


def _prompt(args: argparse.Namespace) -> str:
    """The prompt, from the option or from a pipe."""
    if args.prompt is not None:
        prompt: str = args.prompt
    elif sys.stdin.isatty():
        raise UsageError('no prompt: give one with -p "..." or pipe it in')
    else:
        try:
            prompt = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"the prompt on standard input is no {sys.stdin.encoding} text: {error}") from error
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    return prompt
