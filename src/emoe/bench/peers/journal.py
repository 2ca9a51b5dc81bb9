"""What a comparison has measured so far, kept line by line in a file, so that a run that ended early goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emoe.errors import UsageError

SCHEMA = "emoe-bench-peers-rows/1"


class Journal:
    """A file of JSON lines: the conditions, then one line for each process that was measured or failed.

    A line that was cut off when the machine stopped is dropped; its process is measured again.
    """

    def __init__(self, file: Path, conditions: dict[str, Any]) -> None:
        """Open `file`, or begin it.

        Raises:
            UsageError: it is something else, was measured under other conditions, or cannot be written.
        """
        self.file = file
        try:
            whole, kept = self._read()
            if whole:
                self._check(json.loads(whole[0]), json.loads(json.dumps(conditions)))
            with file.open("ab") as out:
                out.truncate(kept)
            self.lines: list[dict[str, Any]] = [json.loads(line) for line in whole[1:]]
            if not whole:
                self.add({"schema": SCHEMA, "conditions": conditions})
        except OSError as error:
            raise UsageError(f"{file} cannot be written ({error.strerror}); choose another file with --out") from error
        except ValueError as error:
            raise UsageError(
                f"{file} is no file of `emoe bench peers --out` ({error}); choose another with --out"
            ) from error

    def _read(self) -> tuple[list[bytes], int]:
        """The whole lines, and how many bytes they are."""
        if not self.file.exists():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            return [], 0
        content = self.file.read_bytes()
        kept = content.rfind(b"\n") + 1
        if content and not kept and not b'{"schema": "emoe-bench-peers-rows'.startswith(content[:33]):
            raise ValueError("it has no whole line")  # rather than make an empty file of somebody's
        return content[:kept].splitlines(), kept

    def _check(self, head: Any, conditions: dict[str, Any]) -> None:
        if not isinstance(head, dict) or head.get("schema") != SCHEMA:
            raise UsageError(
                f"{self.file} is no file of `emoe bench peers --out` in the format {SCHEMA}; choose another with --out"
            )
        before = head["conditions"]
        names = sorted(conditions.keys() | before.keys())
        other = [name for name in names if before.get(name) != conditions.get(name)]
        if other:
            said = "; ".join(f"{name}: {before.get(name)} there, {conditions.get(name)} now" for name in other)
            raise UsageError(
                f"{self.file} was measured under other conditions ({said}); give the same ones to go on, or choose "
                "another file with --out"
            )

    def add(self, line: dict[str, Any]) -> None:
        """Append a line, and see that it is on the disk."""
        with self.file.open("ab") as out:
            out.write(json.dumps(line).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())

    def of(self, memory_limit: str, name: str) -> Iterator[dict[str, Any]]:
        """What was kept of one row."""
        return (line for line in self.lines if (line["memory_limit"], line["name"]) == (memory_limit, name))
