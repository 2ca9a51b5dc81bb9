"""Policies of your own, without a change to emoe: Python files named in the environment (docs/extending.md).

    EMOE_PLUGINS=my_rules.py,my_package.policies emoe simulate TRACE --policy my-rule

A file registers what it defines in the registries of emoe when it is run: `EVICTION_RULES`, `SCORERS`, `PREDICTORS`,
`SCHEDULERS`. Every command runs the files before it looks a name up, and so do the processes that a benchmark starts.
A name that is taken is refused (`Registry`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from typing import Any, ClassVar, Generic, TypeVar
from zlib import crc32

from emoe.errors import UsageError, named

VARIABLE = "EMOE_PLUGINS"

_T = TypeVar("_T")


class Registry(dict[str, _T], Generic[_T]):
    """What can be had by name: a dict whose `table[name] = made` refuses a name that is taken.

    Registries with one `option` share their names, because one option of the command line chooses among all of them:
    a scorer called "lru" would otherwise stand before the eviction rule, or behind it.
    """

    _all: ClassVar[list[Registry[Any]]] = []

    def __init__(self, what: str, option: str, own: Mapping[str, _T]) -> None:
        """Start with emoe's `own`. `what` is the kind of thing in an error's text."""
        super().__init__(own)
        self._what, self._option = what, option
        Registry._all.append(self)

    def __setitem__(self, name: str, made: _T) -> None:
        """Register `made`; the same definition again (a file that is run twice) takes its own place.

        Raises:
            UsageError: something else has the name.
        """
        for table in Registry._all:
            if table._option == self._option and name in table and _origin(table[name]) != _origin(made):
                remedy = f", or take its place: .replace({name!r}, ...)" if table is self else ""
                raise UsageError(
                    f"the {self._what} {_origin(made)} cannot be called {name!r}: that is the {table._what} "
                    f"{_origin(table[name])}. Choose a new name{remedy}."
                )
        super().__setitem__(name, made)

    def replace(self, name: str, made: _T) -> None:
        """Put `made` in the place of what has the name here.

        Raises:
            UsageError: nothing has it.
        """
        named(self._what, name, self)
        super().__setitem__(name, made)


def _origin(made: object) -> str:
    """Where something was defined: a class or function by its full name."""
    return f"{made.__module__}.{getattr(made, '__qualname__', type(made).__qualname__)}"


def load_plugins(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Run what EMOE_PLUGINS names, in order, each once in a process; return the names of its modules.

    Names with commas between them: files that end in ".py", or modules that Python can import.

    Raises:
        UsageError: a file or module is not there, or fails when it is run, or takes a name that is taken.
    """
    return [_load(word.strip()) for word in environ.get(VARIABLE, "").split(",") if word.strip()]


def lacking(made: object, protocol: type) -> list[str]:
    """What a protocol asks for and `made` does not have. Inherited members of a protocol are not looked at."""
    members = dict.fromkeys([*getattr(protocol, "__annotations__", {}), *vars(protocol)])
    return [name for name in members if not name.startswith("_") and not hasattr(made, name)]


def check_conforms(made: object, protocol: type, what: str, name: str) -> None:
    """Check that what a registry made has all that the rest of emoe will ask it for.

    Raises:
        UsageError: it has not; the text says what it lacks.
    """
    missing = lacking(made, protocol)
    if missing:
        raise UsageError(
            f"the {what} {name!r} ({type(made).__module__}.{type(made).__qualname__}) lacks {', '.join(missing)}: see "
            f"{protocol.__module__}.{protocol.__qualname__}."
        )


def _load(name: str) -> str:
    if not name.endswith(".py"):
        module = name
        run: Callable[[], object] = partial(import_module, name)
    else:
        file = Path(name).expanduser().resolve()
        module = f"emoe_plugin_{file.stem}_{crc32(bytes(file)):08x}"  # files of one name lie in different folders
        run = partial(_run_file, module, file)
    if module in sys.modules:
        return module
    try:
        run()
    except UsageError as error:
        raise UsageError(f"{VARIABLE}: {name}: {error}") from error
    except Exception as error:  # whatever a stranger's file raises: it cannot be used, and the reason is the error's
        where = extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
        raise UsageError(f"{VARIABLE}: {name} cannot be used: {told}") from error
    return module


def _run_file(module: str, file: Path) -> object:
    if not file.is_file():
        raise UsageError(f"there is no file {file}. Give Python files or modules, with commas between them.")
    spec = spec_from_file_location(module, file)
    if spec is None or spec.loader is None:
        raise UsageError("it is not a Python file.")
    made = module_from_spec(spec)
    sys.modules[module] = made  # first: dataclasses look their module up while they are made
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[module]
        raise
    return made
