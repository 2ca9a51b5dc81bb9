"""Ctrl-C wherever a test wants it: at a line of the code under test, and again a few calls later."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import emoe.checkpoint.crew
import emoe.model.runtime
import emoe.residency
import emoe.residency.virtual

CODE = (
    str(Path(emoe.residency.__file__).parent),
    str(Path(emoe.checkpoint.crew.__file__)),
    str(Path(emoe.model.runtime.__file__)),
)
"""Where interrupts come."""

NOT_IN = str(Path(emoe.residency.virtual.__file__))
"""A device's own work goes on, whatever happens to the program."""


@dataclass
class Interrupts:
    """Raises KeyboardInterrupt on this thread at a line of the code under test, and at a call some calls after that."""

    line: int
    then: int
    lines: int = 0
    calls: int = 0
    raised: list[str] = field(default_factory=list)

    def _mine(self, frame: FrameType) -> bool:
        return frame.f_code.co_filename.startswith(CODE) and frame.f_code.co_filename != NOT_IN

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if not self._mine(frame):
            return None
        code = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and not code.startswith("with "):  # left there, a lock stays taken
            self.lines += 1
            if self.lines == self.line:
                self.raised.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                raise KeyboardInterrupt  # Python takes the trace off as it does so
        return self._trace

    def _profile(self, frame: FrameType, event: str, arg: object) -> None:
        if self.raised and event in ("call", "return") and self._mine(frame):
            self.calls += 1
            if self.calls == self.then:
                self.raised.append(f"{event} of {frame.f_code.co_qualname}")
                raise KeyboardInterrupt

    def during(self, work: Callable[[], object]) -> bool:
        """Run `work`; whether an interrupt came, which must not be swallowed."""
        trace, profile = sys.gettrace(), sys.getprofile()
        sys.setprofile(self._profile)
        sys.settrace(self._trace)
        try:
            work()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(trace)
            sys.setprofile(profile)
        assert not self.raised, f"swallowed: {self.raised}"
        return False
