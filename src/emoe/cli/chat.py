"""`emoe chat`: a conversation with history, streamed."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from emoe.cli.early import refuse_early, refuse_settings
from emoe.cli.options import add_command, add_loading, add_model, add_sampling, sampling
from emoe.cli.output import note
from emoe.config import format_bytes
from emoe.errors import UsageError

if TYPE_CHECKING:
    from emoe.cli.session import Answer, Session

HELP = "/reset starts anew, /stats shows figures, /quit leaves; Ctrl-C stops an answer, twice leaves"
LEFT = 130


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "chat", run, "Talk to a model. " + HELP + ".")
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    add_loading(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Converse until /quit, the end of input or two Ctrl-C."""
    options = sampling(args)
    refuse_settings(args)
    refuse_early(args.model, args.expert_memory, args.expert_dtype)
    from emoe.cli.session import announce, open_session

    with open_session(args) as session:
        session.encode("")  # refuses a model without a tokenizer
        announce(session)
        if sys.stdin.isatty():
            import readline  # noqa: F401  gives input() editing and history

            note(HELP)
        return Conversation(session, args.system, options).run()


class Conversation:
    """The messages so far, and the loop that adds to them."""

    def __init__(self, session: Session, system: str | None, options: dict[str, Any]) -> None:
        self._session = session
        self._options = options
        self._system = [{"role": "system", "content": system}] if system else []
        self._last: Answer | None = None
        self._cache: Any = None
        self._cached: list[int] = []
        self.messages: list[dict[str, str]] = list(self._system)

    def run(self) -> int:
        """Read lines and answer them. 130 when Ctrl-C ended it."""
        warned = False
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except UnicodeDecodeError as error:
                raise UsageError(f"what was typed is no {sys.stdin.encoding} text: {error}") from error
            except EOFError:
                if sys.stdin.isatty():
                    print()
                return 0
            except KeyboardInterrupt:
                if warned:
                    print()
                    return LEFT
                print("\n(Ctrl-C once more, or /quit, leaves)", file=sys.stderr)
                warned = True
                continue
            warned = False
            if line in {"/quit", "/exit", "/bye"}:
                return 0
            if line.startswith("/"):
                self._command(line)
            elif line:
                # Stopped by Ctrl-C: the next one, at the prompt, then leaves.
                warned = self.answer(line)

    def _command(self, line: str) -> None:
        if line == "/reset":
            self.messages = list(self._system)
            self._forget_cache()
            note("the conversation starts anew")
        elif line == "/stats":
            self._show_stats()
        else:
            note(HELP if line == "/help" else f"no command {line!r}: {HELP}")

    def _show_stats(self) -> None:
        from emoe.cli.session import figures

        stats = self._session.stats
        if self._last is not None:
            note(figures(self._last, stats))
        note(
            f"{len(self.messages)} messages; {stats['hits']} hits, {stats['misses']} misses, "
            f"{stats['loads']} loads, "
            f"{format_bytes(stats['bytes_read'])} read, waited {stats['load_wait_s']:.2f} s; "
            f"{format_bytes(stats['resident_bytes'])} of {format_bytes(stats['budget_bytes'])} filled"
        )

    def answer(self, text: str) -> bool:
        """Answer one message and remember both; return whether Ctrl-C stopped it."""
        self.messages.append({"role": "user", "content": text})
        ids = self._fitting_ids()
        answer = self._session.generate(ids, past_key_values=self._cache_for(ids), **self._options)
        self._last = answer
        self.messages.append({"role": "assistant", "content": answer.text})
        if answer.stopped:
            print("[stopped]", file=sys.stderr)
        # The last token was chosen but has not passed through the model.
        self._cached = answer.ids[:-1]
        return answer.stopped

    def _fitting_ids(self) -> list[int]:
        """Token ids of the conversation, its oldest turns forgotten where the model has no room for them."""
        context = self._session.context
        reserve = self._options.get("max_new_tokens") or 1
        while True:
            ids = self._session.encode(self.messages)
            turns = self.messages[len(self._system) :]
            if context is None or len(ids) + reserve <= context or len(turns) < 3:
                return ids
            note(f"the oldest turn is forgotten: the conversation is longer than {context} tokens")
            self.messages = self._system + turns[2:]

    def _cache_for(self, ids: list[int]) -> Any:
        """The cache of what `ids` begins with, if that is what was computed last; else a new one."""
        from transformers import DynamicCache

        usable = self._cache is not None and len(self._cached) < len(ids) and ids[: len(self._cached)] == self._cached
        if not usable or self._cache.get_seq_length() != len(self._cached):
            self._cache = DynamicCache(config=self._session.model.config)
        return self._cache

    def _forget_cache(self) -> None:
        self._cache, self._cached = None, []
