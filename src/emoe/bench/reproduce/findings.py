"""What an experiment found: claims with verdicts, tables, pictures; and how that is kept in a folder.

FOLDER/finding.json   claims, notes, captions, when, how long
FOLDER/NAME.csv       one for each table
FOLDER/NAME.png|svg   one of each for each picture
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from emoe.checkpoint.whole import write_whole
from emoe.errors import UsageError

Verdict = Literal["holds", "partly", "does not hold", "undecided", "not measured"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
MEANINGS: dict[Verdict, str] = {
    "holds": "the claim is true here, by the rule given with it",
    "partly": "a part of it is true here, or less of it than in the paper",
    "does not hold": "measured, and not true here",
    "undecided": "measured, and prompts or rounds differ too much among themselves to say",
    "not measured": "this run has no number for it",
}
FILE = "finding.json"


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of the paper beside what was measured here.

    text: the claim; paper: its number there; here: ours; why: in plain words what differs, needed unless it holds.

    Raises:
        ValueError: a verdict without its reason.
    """

    text: str
    paper: str
    here: str
    verdict: Verdict
    why: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"no verdict is called {self.verdict!r}: use one of {', '.join(VERDICTS)}.")
        if self.verdict != "holds" and not self.why:
            raise ValueError(f"the claim {self.text!r} has the verdict {self.verdict!r} and no reason: say why.")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of plain values under columns whose names carry their units; kept as NAME.csv.

    shown: also a table of the report, not only a file.

    Raises:
        ValueError: a row of another length than the columns.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    shown: bool = True

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a row of the table {self.name!r} has {len(row)} values for {len(self.columns)} columns"
                )

    def csv(self) -> str:
        """The file's text."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to draw: `draw()` returns a matplotlib figure; kept as NAME.png and NAME.svg."""

    name: str
    caption: str
    draw: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Finding:
    """Everything one experiment found. notes: what a reader must know beside it, a paragraph each."""

    claims: tuple[Claim, ...]
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Kept:
    """A finding as it lies in its folder: the pictures are files."""

    name: str
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...]
    pictures: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    about: Mapping[str, Any]


def write_finding(folder: Path, name: str, found: Finding, about: Mapping[str, Any]) -> Kept:
    """Write tables, pictures and, last, what tells that the experiment is done. `about`: JSON values."""
    from emoe.bench.reproduce.drawing import save

    folder.mkdir(parents=True, exist_ok=True)
    for table in found.tables:
        write_whole(folder / f"{table.name}.csv", table.csv().encode())
    for picture in found.pictures:
        save(picture.draw(), folder / picture.name)
    # A table that is not shown lies in its own file alone.
    tables = tuple(table if table.shown else replace(table, rows=()) for table in found.tables)
    kept = Kept(
        name, found.claims, tables, tuple((p.name, p.caption) for p in found.pictures), found.notes, dict(about)
    )
    write_whole(folder / FILE, (json.dumps(asdict(kept), indent=1) + "\n").encode())
    return kept


def read_finding(folder: Path) -> Kept | None:
    """What an experiment left in its folder; None where it is not done.

    Raises:
        UsageError: the file is damaged.
    """
    file = folder / FILE
    try:
        values = json.loads(file.read_bytes())
        return Kept(
            values["name"],
            tuple(Claim(**each) for each in values["claims"]),
            tuple(
                Table(each["name"], each["title"], tuple(each["columns"]), _rows(each["rows"]), each["shown"])
                for each in values["tables"]
            ),
            tuple((str(name), str(caption)) for name, caption in values["pictures"]),
            tuple(values["notes"]),
            values["about"],
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is damaged ({type(error).__name__}: {error}): remove it, and run again.") from error


def _rows(rows: Sequence[Sequence[Any]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(row) for row in rows)
