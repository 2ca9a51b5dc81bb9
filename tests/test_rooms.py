"""The import rule of docs/architecture.md: a room imports only from rooms above it, so no cycles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "emoe"

# From the ground up; rooms on one line do not import each other.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("config", "plugins"),
    ("checkpoint",),
    ("kernels",),
    ("residency",),
    ("routing",),
    ("prediction",),
    ("tasks",),
    ("policies",),
    ("model", "planner"),
    ("profiling",),
    ("scheduling",),
    ("engine",),
    ("simulation",),
    ("compression",),
    ("server",),
    ("bench",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
# The package's front door (lazy) and `python -m emoe` are no rooms; the embedded model imports no room.
DOORS = {"__init__", "__main__"}
OUTSIDE = {"nano"}
LONGEST_FILE_LINES = 450  # the aim is 400


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of everything `path` imports, at any depth, also under TYPE_CHECKING."""
    package = ("emoe", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from emoe import config` names a room by its alias, `from emoe.config import X` does not.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_rooms(path: Path) -> set[str]:
    names = (name.split(".") for name in imported_modules(path))
    return {parts[1] for parts in names if parts[0] == "emoe" and len(parts) > 1} & (LEVEL.keys() | OUTSIDE)


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_only_from_rooms_above_it(path: Path) -> None:
    room = room_of(path)
    if room in DOORS:
        return
    rooms = imported_rooms(path) - {room}
    if room in OUTSIDE:
        assert not rooms, f"{path.name} is outside the rooms and may not import {sorted(rooms)}"
        return
    assert room in LEVEL, f"{path.name} belongs to no room: add it to ROOMS here and in docs/architecture.md"
    wrong = {other for other in rooms - OUTSIDE if LEVEL[other] >= LEVEL[room]}
    assert not wrong, f"{room} may not import {sorted(wrong)}: they are not above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST_FILE_LINES, f"{path.name} has {lines} lines: is it still one noun?"


def test_the_rule_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    file = tmp_path / "residency" / "x.py"
    file.parent.mkdir()
    file.write_text(
        "import torch, emoe.cli\nfrom emoe import engine\nfrom ..routing import rules\n"
        "def f():\n    from emoe.server.http import app\n"
    )
    assert imported_rooms(file) == {"cli", "engine", "routing", "server"}


def test_importing_emoe_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import emoe, sys; print(emoe.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"
