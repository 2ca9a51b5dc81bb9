"""Policies of your own, without a change to emoe: Python files named in the environment (docs/extending.md).

    EMOE_PLUGINS=my_rules.py,my_package.policies emoe simulate TRACE --policy my-rule

A file registers what it defines in the registries of emoe when it is run: `EVICTION_RULES`, `SCORERS`, `PREDICTORS`,
`SCHEDULERS`. Every command runs the files before it looks a name up, and so do the processes that a benchmark starts.
A name that is taken is refused (`Registry`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from types import CellType, FunctionType
from typing import Any, ClassVar, Generic, Self, TypeVar
from zlib import crc32

from emoe.errors import UsageError, named

VARIABLE = "EMOE_PLUGINS"

_T = TypeVar("_T")


class Registry(dict[str, _T], Generic[_T]):
    """What can be had by name: a dict that refuses a name that is taken, however it is given.

    Registries with one `option` share their names, because one option of the command line chooses among all of them:
    a scorer called "lru" would otherwise stand before the eviction rule, or behind it.

    Raises:
        UsageError: a table that was there before has a name that belongs here.
    """

    _all: ClassVar[list[Registry[Any]]] = []

    def __init__(self, what: str, option: str, own: Mapping[str, _T]) -> None:
        """Start with emoe's `own`. `what` is the kind of thing in an error's text."""
        super().__init__(own)
        self._what, self._option = what, option
        for name, made in own.items():  # what came before this table could not know of it
            for table in self._others(name, made):
                raise table._refusal(name, table[name], self)
        Registry._all.append(self)

    def __setitem__(self, name: str, made: _T) -> None:
        """Register `made`; the same definition again (a file that is run twice) takes its own place.

        Raises:
            UsageError: something else has the name.
        """
        for table in self._others(name, made):
            raise self._refusal(name, made, table)
        super().__setitem__(name, made)

    def update(self, *args: Any, **kwargs: _T) -> None:
        """As a dict's, by `table[name] = made`."""
        for name, made in dict(*args, **kwargs).items():
            self[name] = made

    def setdefault(self, name: str, made: _T) -> _T:
        """As a dict's, by `table[name] = made`."""
        if name not in self:
            self[name] = made
        return self[name]

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]
        self.update(other)
        return self

    def replace(self, name: str, made: _T) -> None:
        """Put `made` in the place of what has the name here.

        Raises:
            UsageError: nothing has it.
        """
        named(self._what, name, self)
        super().__setitem__(name, made)

    @contextmanager
    def meanwhile(self, more: Mapping[str, _T]) -> Iterator[None]:
        """Inside the block have those of `more` besides that are not here, whatever other tables call so."""
        added = {name: made for name, made in more.items() if name not in self}
        super().update(added)
        try:
            yield
        finally:
            for name in added:
                del self[name]

    def _others(self, name: str, made: object) -> Iterator[Registry[Any]]:
        """Tables that share names with this one and have something else under this one."""
        for table in Registry._all:
            if table._option == self._option and name in table and not _same(table[name], made):
                yield table

    def _refusal(self, name: str, made: object, table: Registry[Any]) -> UsageError:
        remedy = f", or take its place: .replace({name!r}, ...)" if table is self else ""
        return UsageError(
            f"the {self._what} {_origin(made)} cannot be called {name!r}: that is the {table._what} "
            f"{_origin(table[name])}. Choose a new name{remedy}."
        )


def _same(one: object, other: object) -> bool:
    """Whether two things are one definition: a file that is run twice, under two names too, defines the same again."""
    if isinstance(one, partial) and isinstance(other, partial):
        return (one.args, one.keywords) == (other.args, other.keywords) and _same(one.func, other.func)
    names = [getattr(each, "__qualname__", None) for each in (one, other)]
    if None in names:
        return one is other or bool(one == other)
    if names[0] != names[1] or _source(one) != _source(other):
        return False
    if isinstance(one, FunctionType) and isinstance(other, FunctionType) and "<" in one.__qualname__:
        # One factory makes many functions of this name, and one file has many lambdas.
        return (one.__code__, one.__defaults__) == (other.__code__, other.__defaults__) and _holds(one) == _holds(other)
    return True


def _holds(made: FunctionType) -> list[object]:
    """The values of a function's closure, for a comparison: functions and classes in it by their names."""
    cells = [cell for cell in made.__closure__ or () if cell != CellType()]  # an empty one has no value
    values = [cell.cell_contents for cell in cells]
    return [(each.__qualname__, _source(each)) if hasattr(each, "__qualname__") else each for each in values]


def _source(made: object) -> str | Path:
    """The file in which a class or function was defined; its module's name where that has none."""
    file = getattr(sys.modules.get(made.__module__), "__file__", None)
    return made.__module__ if file is None else Path(file).resolve()


def _origin(made: object) -> str:
    """Where something was defined, for people: a class or function by its full name."""
    if isinstance(made, partial):
        return f"partial of {_origin(made.func)}"
    defined = made if hasattr(made, "__qualname__") else type(made)
    return f"{defined.__module__}.{defined.__qualname__}"


def load_plugins(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Run what EMOE_PLUGINS names, in order, each once in a process; return the names of its modules.

    What has been imported already is not run again.

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
        if (imported := _imported(file)) is not None:
            return imported
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


def _imported(file: Path) -> str | None:
    """The name under which this process has run a file already: it may have been imported, or be the program."""
    for name, module in list(sys.modules.items()):
        found = getattr(module, "__dict__", {}).get("__file__")  # asked of the module itself, some would import more
        if isinstance(found, str) and Path(found).name == file.name and Path(found).resolve() == file:
            return name
    return None


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
