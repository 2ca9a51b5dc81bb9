"""Policies of one's own: the page that explains them is run, and what is wrong with a file is said."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from emoe.bench.worker import Worker
from emoe.cli import main
from emoe.errors import UsageError
from emoe.plugins import VARIABLE, Registry, load_plugins
from emoe.prediction.protocol import RoutingShape
from emoe.prediction.registry import PREDICTORS, SCORERS, make_predictor, make_scorer
from emoe.residency.eviction import EVICTION_RULES, make_eviction
from emoe.scheduling.registry import SCHEDULERS, make_scheduler

PAGE = (Path(__file__).parent.parent / "docs/extending.md").read_text()
REGISTRIES: tuple[dict[str, Any], ...] = (EVICTION_RULES, SCORERS, PREDICTORS, SCHEDULERS)


def block(language: str) -> str:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return found[0]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Registries and modules as they were."""
    kept, modules = [dict(each) for each in REGISTRIES], set(sys.modules)
    yield
    for registry, before in zip(REGISTRIES, kept, strict=True):
        registry.clear()
        registry.update(before)
    for name in set(sys.modules) - modules:
        if name.startswith("emoe_plugin_"):
            del sys.modules[name]


@pytest.mark.parametrize("line", block("bash").splitlines())
def test_the_page_on_extending_is_run(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_policies.py").write_text(block("python"))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "my_policies.py"))
    program, *args = shlex.split(line)
    assert program == "emoe"
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert printed
    if args[0] == "simulate":
        assert any(name in printed for name in ("last-of-task", "shortest-first"))


def test_a_file_is_run_once_and_modules_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "mine.py"
        file.write_text(f"from emoe.scheduling.registry import SCHEDULERS\nSCHEDULERS[{folder!r}] = len(SCHEDULERS)\n")
    (tmp_path / "emoe_plugin_module.py").write_text(
        "from emoe.scheduling.registry import SCHEDULERS as s\ns['c'] = 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    named = {VARIABLE: f" {tmp_path}/a/mine.py, emoe_plugin_module,,{tmp_path}/b/mine.py"}
    count = len(SCHEDULERS)
    first = load_plugins(named)
    assert load_plugins(named) == first
    assert len(set(first)) == 3
    known: dict[str, Any] = SCHEDULERS
    assert (known["a"], known["c"], known["b"]) == (count, 7, count + 2)
    assert load_plugins({}) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no file"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("x = 1\ny = x / 0\n", "mine.py, line 2"),
        ("def f(:\n", "SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(
    text: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv(VARIABLE, str(file))
    for _ in range(2):  # the second time as the first: nothing half-made is kept
        assert main(["plan"]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"emoe: error: {VARIABLE}: ")
        assert printed.err.count("\n") == 1
        assert said in printed.err
        assert printed.out == ""


@pytest.mark.parametrize(
    ("registry", "name", "said"),
    [
        ("SCORERS", "next-use", "that is the scorer emoe.prediction.registry"),
        ("PREDICTORS", "lru", "that is the eviction rule emoe.residency.eviction.LRU. Choose a new name.\n"),
        ("SCORERS", "static", "that is the predictor emoe.prediction.registry"),
        ("PREDICTORS", "random", "that is the policy of the simulator "),
        ("SCORERS", "belady", "that is the policy of the simulator "),
    ],
)
def test_a_name_that_is_taken_is_refused(
    registry: str,
    name: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        f"from emoe.prediction.registry import {registry}\nclass Mine:\n    pass\n{registry}[{name!r}] = Mine\n"
    )
    monkeypatch.setenv(VARIABLE, str(file))
    import_module("emoe.simulation.policies")  # its own names are taken from when it is there
    assert main(["plan"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"emoe: error: {VARIABLE}: {file}: the ")
    assert "mine_" in printed and f".Mine cannot be called {name!r}: " in printed
    assert said in printed


def test_a_name_can_be_taken_on_purpose_and_a_cell_run_twice() -> None:
    table: Registry[type] = Registry("thing", "test-only", {"int": int})
    with pytest.raises(
        UsageError, match=r"the thing builtins\.str cannot be called 'int': that is the thing builtins\.int"
    ):
        table["int"] = str
    table.replace("int", str)
    table["int"] = str
    assert table == {"int": str}
    with pytest.raises(UsageError, match="no thing is called 'float': choose one of int"):
        table.replace("float", float)
    one, two = (type("Cell", (), {"__module__": "__main__"}) for _ in range(2))
    table["cell"] = one
    table["cell"] = two
    assert table["cell"] is two


MAKES = """
def of(size, then=None):
    def made():
        return size, then
    return made

def loops():
    def again():
        return again
    return again

FOUND = [of(1), of(2), of(1, of), lambda: 1, lambda: 2, *(lambda size=size: size for size in (3, 4)), loops()]
"""


def test_functions_of_one_factory_and_lambdas_of_one_file_are_different(tmp_path: Path) -> None:
    """And each is the same when its file is run again."""
    file = tmp_path / "makes.py"
    file.write_text(MAKES)
    runs = [import_of(file, f"emoe_plugin_makes_{number}").FOUND for number in range(2)]
    table: Registry[Any] = Registry("thing", "test-factories", {})
    for number, made in enumerate(runs[0]):
        table["it"] = made
        for again, other in enumerate(runs[1]):
            if again == number:
                table["it"] = other
            else:
                with pytest.raises(UsageError, match="cannot be called 'it'"):
                    table["it"] = other
        del table["it"]


def import_of(file: Path, name: str) -> Any:
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = made = module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_however_a_name_is_given_it_is_looked_at() -> None:
    table: Registry[type] = Registry("thing", "test-ways", {"int": int})
    other: Registry[type] = Registry("other", "test-ways", {"str": str})
    for give in (
        lambda: table.update({"new": int, "str": float}),
        lambda: table.update(str=float),
        lambda: table.setdefault("str", float),
        lambda: table.__ior__({"str": float}),
        lambda: other.setdefault("int", float),
    ):
        with pytest.raises(UsageError, match=r"float cannot be called '(str|int)': that is the (other|thing) builtins"):
            give()
    assert table == {"int": int, "new": int} and table.setdefault("int", float) is int
    table |= {"float": float}
    assert table.setdefault("more", bool) is bool and list(table) == ["int", "new", "float", "more"]


def test_a_table_that_comes_later_keeps_its_names() -> None:
    """Of two that share names, a plug-in may have been imported between them."""
    early: Registry[type] = Registry("early", "test-late", {})
    early["int"] = str
    with pytest.raises(UsageError, match=r"the early builtins.str cannot be called 'int': that is the late builtins.i"):
        Registry("late", "test-late", {"int": int})
    early.replace("int", int)
    late: Registry[type] = Registry("late", "test-late", {"int": int})
    assert late == early


def test_what_is_bound_differently_is_something_else() -> None:
    table: Registry[Any] = Registry("thing", "test-partial", {})
    table["two"] = partial(int, base=2)
    table["two"] = partial(int, base=2)
    for another in (partial(int, base=3), partial(int, "1"), partial(float), int):
        with pytest.raises(UsageError, match=r"cannot be called 'two': that is the thing partial of builtins.int"):
            table["two"] = another
    table["three"] = three = 3
    table["three"] = three
    with pytest.raises(UsageError, match=r"builtins\.int cannot be called 'three'"):
        table["three"] = 4


MINE = """
from functools import partial
from emoe.prediction.registry import PREDICTORS, SCORERS
from emoe.scheduling.registry import SCHEDULERS
class Mine: pass
class Kept:
    def __call__(self): return self
SCHEDULERS["mine"] = Mine
SCORERS["mine-2"] = partial(Mine, 2)
"""


@pytest.mark.parametrize("first", ["import", "variable"])
def test_a_file_may_be_imported_and_named(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the user's program and in the environment, in either order."""
    file = tmp_path / "emoe_plugin_of_mine.py"
    file.write_text(MINE + ('SCHEDULERS["kept"] = Kept()\n' if first == "import" else ""))
    monkeypatch.syspath_prepend(tmp_path)
    known: dict[str, Any] = SCHEDULERS
    if first == "import":
        imported = import_module(file.stem)
        assert load_plugins({VARIABLE: str(file)}) == [file.stem]
        assert known["mine"] is imported.Mine
    else:
        assert load_plugins({VARIABLE: str(file)}) != [file.stem]
        assert known["mine"] is not import_module(file.stem)
    (tmp_path / "other.py").write_text(MINE)
    with pytest.raises(UsageError, match=r"other_\w+.Mine cannot be called 'mine': that is the scheduler emoe_"):
        load_plugins({VARIABLE: str(tmp_path / "other.py")})


def test_a_process_of_a_benchmark_runs_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "nowhere.py")
    with pytest.raises(UsageError, match=f"{VARIABLE}: nowhere.py: there is no file .*nowhere.py"):
        Worker().load({})


def test_what_lacks_something_is_refused_by_name() -> None:
    class Empty:
        name = "empty"

        def __init__(self, *_: object) -> None:
            pass

    EVICTION_RULES["empty"] = Empty  # type: ignore[assignment]
    SCORERS["empty"] = PREDICTORS["empty"] = Empty  # type: ignore[assignment]
    SCHEDULERS["empty"] = Empty  # type: ignore[assignment]
    shape = RoutingShape(2, 4, 2)
    for make, lacks in (
        (lambda: make_eviction("empty"), "eviction rule 'empty' .* lacks shared_from, steady, score: .*Eviction"),
        (lambda: make_scorer("empty", shape), "scorer 'empty' .* lacks begin_prompt, observe, scores: .*UseScorer"),
        (lambda: make_predictor("empty", shape), "lacks begin_prompt, observe, predict: .*protocol.Predictor"),
        (lambda: make_scheduler("empty"), "lacks admit: .*protocol.Scheduler"),
    ):
        with pytest.raises(UsageError, match=lacks):
            make()


def test_what_a_comparison_adds_is_gone_afterwards() -> None:
    """Names that other tables have, too; what is here already stays as it is."""
    one, other = Registry("rule", "comparing", {"a": 1}), Registry("scorer", "comparing", {"b": 2})
    with pytest.raises(UsageError, match="cannot be called 'b'"):
        one["b"] = 3
    with pytest.raises(ZeroDivisionError), one.meanwhile({"a": 8, "b": 9}):
        assert dict(one) == {"a": 1, "b": 9}
        raise ZeroDivisionError
    assert (dict(one), dict(other)) == ({"a": 1}, {"b": 2})
