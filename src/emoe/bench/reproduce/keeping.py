"""What a run keeps in OUT/work: what it is of, and JSON values that are computed once.

A run that was stopped goes on from there; experiments share what they have in common.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emoe.checkpoint.whole import write_whole
from emoe.errors import UsageError
from emoe.routing.counts import PromptCounts
from emoe.routing.trace import Trace

Step = Callable[[str, int, int], None]

WORK = "work"
JOB = "job.json"
BEGUN = "begun"


class Cells:
    """The values kept in OUT/work. step: told of progress; frozen: nothing is measured, only read (`--rejudge`)."""

    def __init__(self, out: Path, step: Step) -> None:
        self.out = out
        self.work = out / WORK
        self.step = step
        self.frozen = False

    def begin(self, job: Mapping[str, Any], added: Mapping[str, Any]) -> str:
        """Note what the run is of, or go on with the one that is kept; return its mark.

        The mark is a hash of all that is asked, another one for every run that began anew. job: what must be as it was;
        added: what may be added to a run: what it computed stays, its findings are made anew.

        Raises:
            UsageError: OUT holds a run of something else.
        """
        file = self.work / JOB
        if file.is_file():
            before = json.loads(file.read_bytes())
            begun = before.pop(BEGUN, "")
            other = [name for name in {**before, **job} if before.get(name) != job.get(name)]
            if other:
                raise UsageError(
                    f"{self.out} holds a run with other {' and '.join(other)}: give another --out, the same "
                    f"options, or --fresh to begin anew."
                )
        else:
            begun = uuid.uuid4().hex
            self.work.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps({**job, BEGUN: begun}, indent=1).encode())
        text = json.dumps({**job, BEGUN: begun, **added}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def cell(self, of: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """A JSON value that `compute` makes once: the run that goes on, and other experiments, find it kept.

        of: what it belongs to (an experiment's name, or a measurement that several share); key: everything that the
        value depends on beside the run's settings.
        """
        text = json.dumps(dict(key), sort_keys=True)
        file = self.work / "cells" / of / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        try:
            return json.loads(file.read_bytes())["value"]
        except FileNotFoundError:
            pass
        self.not_frozen(f"{of!r} ({text})")
        value = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"key": dict(key), "value": value}, indent=1).encode())
        return json.loads(file.read_bytes())["value"]

    def cells(self, of: str, keys: Sequence[Mapping[str, Any]], compute: Callable[..., Any]) -> list[Any]:
        """A cell for each key, with progress; `compute(**key)` makes one."""
        values: list[Any] = []
        for number, key in enumerate(keys):
            self.step(of, number, len(keys))
            values.append(self.cell(of, key, lambda key=key: compute(**key)))  # type: ignore[misc]
        self.step(of, len(keys), len(keys))
        return values

    def not_frozen(self, what: str) -> None:
        """Refuse to measure `what` where nothing may be measured.

        Raises:
            UsageError: the run is only judged again.
        """
        if self.frozen:
            raise UsageError(
                f"{self.out} does not hold {what}, and --rejudge measures nothing: leave it out to measure."
            )


def forget(out: Path) -> None:
    """Remove the cells, routes and profile that an earlier run kept; its findings stay until they are made anew."""
    shutil.rmtree(out / WORK, ignore_errors=True)


def routes_digest(routes: Trace | PromptCounts) -> str:
    """A hash of routes and labels, to tell whether something was computed from the same ones."""
    arrays = (routes.counts,) if isinstance(routes, PromptCounts) else (routes.experts, routes.offsets)
    found = hashlib.sha256(json.dumps([routes.tasks, [list(array.shape) for array in arrays]]).encode())
    for array in (*arrays, routes.task):
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:24]


def file_digest(path: Path) -> str:
    """A hash of a file's bytes.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error
