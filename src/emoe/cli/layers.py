"""Options of a command that may also stand in the environment and in a file: flag > environment > file > default."""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from emoe.errors import UsageError

PREFIX = "EMOE_"
OF_EMOE = frozenset({"cache", "kernels", "plugins"})
"""Variables that emoe reads whatever runs: EMOE_CACHE, EMOE_KERNELS, EMOE_PLUGINS. They are no options of a command."""

_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})


class Layers:
    """The options of one command. What its groups add can be given three ways, under one name.

    `--max-queue` is EMOE_MAX_QUEUE in the environment and `max-queue` (or `max_queue`) in the file.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser
        self._actions: dict[str, argparse.Action] = {}
        self._defaults: dict[str, Any] = {}
        parser.add_argument(
            "--config", metavar="FILE", help="read options from a TOML file; the environment and flags go before it"
        )

    def group(self, title: str, description: str | None = None) -> Any:
        """An argument group to add options to."""
        return _Group(self, self._parser.add_argument_group(title, description))

    def note(self, action: argparse.Action) -> None:
        """Remember an option. The parser then sets only what is really given."""
        names = [name[2:] for name in action.option_strings if name.startswith("--")] or [action.dest]
        for name in names:
            self._actions[_key(name)] = action
        self._defaults[action.dest] = action.default
        action.default = argparse.SUPPRESS

    def resolve(self, args: argparse.Namespace, environ: Mapping[str, str]) -> argparse.Namespace:
        """Every option's value.

        Raises:
            UsageError: a file that cannot be read, a name that no option has, a value that an option does not take.
        """
        given = {name[len(PREFIX) :].lower(): name for name in environ if name.startswith(PREFIX)}
        path = args.config if args.config is not None else environ.get(PREFIX + "CONFIG")
        values = dict(self._defaults)
        if path is not None:
            values |= self._layer({name: (value, f"{path}: {name}") for name, value in _read(path).items()}, path)
        given = {key: name for key, name in given.items() if key not in {"config", *OF_EMOE}}
        values |= self._layer({key: (environ[name], name) for key, name in given.items()}, "the environment")
        return argparse.Namespace(**(values | vars(args)))

    def _layer(self, found: Mapping[str, tuple[Any, str]], source: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, (value, where) in found.items():
            action = self._actions.get(_key(name))
            if action is None:
                raise UsageError(self._unknown(where, name))
            if action.dest in values:
                raise UsageError(f"{source} has two values for {_flag(action)}; give one")
            values[action.dest] = _convert(action, value, where)
        return values

    def _unknown(self, where: str, name: str) -> str:
        close = difflib.get_close_matches(_key(name), self._actions, 1)
        hint = f"; did you mean {close[0].replace('_', '-')}?" if close else "; --help lists all"
        return f"{where} is no option of {self._parser.prog}{hint}"


class _Group:
    """An argument group whose options are noted."""

    def __init__(self, layers: Layers, group: Any) -> None:
        self._layers = layers
        self._group = group

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        """As argparse's."""
        action: argparse.Action = self._group.add_argument(*names, **kwargs)
        self._layers.note(action)
        return action


def _key(name: str) -> str:
    return name.replace("-", "_")


def _flag(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else str(action.metavar)


def _read(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --config {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path} is not valid TOML: {error}") from error


def _convert(action: argparse.Action, value: Any, where: str) -> Any:
    """A value as the option would have read it from the command line."""
    if action.nargs == 0:
        return _switch(value, where)
    if isinstance(action, argparse._AppendAction):
        many = value if isinstance(value, list) else str(value).split(",")
        return [_one(action, each, where) for each in many]
    return _one(action, value, where)


def _one(action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{where} must be text or a number, not {value!r}")
    try:
        made = action.type(str(value)) if callable(action.type) else str(value)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{where}: {error}") from error
    except ValueError as error:
        raise UsageError(f"{where}: {value!r} is not what {_flag(action)} takes") from error
    choices: Iterable[Any] | None = action.choices
    if choices is not None and made not in choices:
        raise UsageError(f"{where}: {made!r} is none of {', '.join(map(str, choices))}")
    return made


def _switch(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text not in _TRUE | _FALSE:
        raise UsageError(f"{where} must be true or false, not {value!r}")
    return text in _TRUE
