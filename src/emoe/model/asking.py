"""Asking a predictor: one that answers at once, or one in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from emoe.prediction.protocol import Predictor
from emoe.prediction.worker import PredictorProcess

Array = npt.NDArray[Any]
Task = str | None


class Spent(NamedTuple):
    """Predictions made, the seconds they took, and the resident bytes of the predictor's own process."""

    calls: int = 0
    seconds: float = 0.0
    memory_bytes: int = 0


class Answers(Protocol):
    """A predictor that may take its time: told of whole prompts, asked, and polled for what it answers."""

    def tell(self, task: Task, routes: Array) -> None:
        """Note a prompt that has ended, with the routes [tokens, layers, k] of all its tokens."""
        ...

    def ask(self, tasks: Sequence[Task]) -> None:
        """Ask for the shares of the next prompts, of these tasks. A question not yet answered is forgotten."""
        ...

    def poll(self) -> dict[Task, Array] | None:
        """The answer to the last question, [layers, experts] for each task; None while there is none (any more)."""
        ...

    def spent(self) -> Spent:
        """What the answers took."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class AnswersHere:
    """A predictor that answers at once, in this process."""

    def __init__(self, predictor: Predictor) -> None:
        """Wrap it."""
        self._predictor = predictor
        self._answer: dict[Task, Array] | None = None
        self._spent = Spent()

    def tell(self, task: Task, routes: Array) -> None:
        """Let it observe one prompt."""
        self._predictor.begin_prompt(task)
        self._predictor.observe(routes)

    def ask(self, tasks: Sequence[Task]) -> None:
        """Predict now."""
        start = time.perf_counter()
        self._answer = {task: self._predictor.predict(task) for task in tasks}
        self._spent = Spent(self._spent.calls + len(tasks), self._spent.seconds + time.perf_counter() - start)

    def poll(self) -> dict[Task, Array] | None:
        """Give the answer once."""
        answer, self._answer = self._answer, None
        return answer

    def spent(self) -> Spent:
        """All of it on the critical path."""
        return self._spent

    def close(self) -> None:
        """Nothing was started."""


class AnswersAside:
    """A predictor in a process of its own: decoding goes on while it thinks."""

    def __init__(self, process: PredictorProcess) -> None:
        """Wrap a process that was started; it is closed with this."""
        self._process = process
        self._left: list[Task] = []
        self._ticket = 0
        self._answer: dict[Task, Array] = {}
        self._spent = Spent()

    def tell(self, task: Task, routes: Array) -> None:
        """Send one prompt."""
        self._process.begin_prompt(task)
        self._process.observe(routes)

    def ask(self, tasks: Sequence[Task]) -> None:
        """Ask for the first task; `poll` asks for the next when its answer is there."""
        self._left, self._answer = list(tasks), {}
        self._ticket = self._process.ask(self._left[0])

    def poll(self) -> dict[Task, Array] | None:
        """Take what has come; the whole answer once it is complete."""
        while (answer := self._process.poll()) is not None:
            self._spent = Spent(self._spent.calls + 1, self._spent.seconds + answer.seconds)
            if answer.ticket != self._ticket or not self._left:
                continue
            self._answer[self._left.pop(0)] = answer.shares
            if not self._left:
                return self._answer
            self._ticket = self._process.ask(self._left[0])
        return None

    def spent(self) -> Spent:
        """Beside the critical path, in the other process."""
        return Spent(self._spent.calls, self._spent.seconds, self._process.memory_bytes())

    def close(self) -> None:
        """End the process."""
        self._process.close()
