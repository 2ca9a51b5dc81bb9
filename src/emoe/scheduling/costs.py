"""What a step takes: profiled, then corrected by what steps really took.

A step of the engine decodes one token of each running request and reads some input tokens. Its time is

    step + decode tokens * token + input tokens * prefill_token + KV tokens read * kv_token      (computing)
    + loads * expert_load                                                                       (waiting)

The first line is fitted to the seconds of a step without its waiting, the second to the waiting alone, both over the
last few hundred steps. The loads of a step to come are expected from the shares of tokens that each expert key gets
from each task: n tokens leave a key untouched with the probability (1 - p)^n.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe.prediction.protocol import RoutingShape
from emoe.scheduling.fit import Fit
from emoe.scheduling.protocol import Request

Array = NDArray[Any]

FORGET = 0.995
"""A step counts half as much 140 steps later."""
KV_SHARE = 1e-4
"""Of the time for a token: the unit in which the time for reading one token of KV memory is sought; it starts at 0."""
MOST_TASKS = 256
"""What is known of so many tasks is kept at hand."""
SURE = 1e-9
"""The least chance of leaving a key untouched: logarithms stay finite."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a step did and took.

    Attributes:
        decode_tokens: requests that decoded a token.
        prefill_tokens: input tokens read.
        kv_tokens: tokens of KV memory that attention read, those of all its requests together.
        loads: experts loaded that were waited for.
        seconds: from its start to its end, waiting included.
        wait_s: of it, waiting for experts.
    """

    decode_tokens: int
    prefill_tokens: int
    kv_tokens: int
    loads: int
    seconds: float
    wait_s: float = 0.0


@dataclass(slots=True)
class _Mean:
    """An exponentially forgetting mean that starts at a prior which counts as one value."""

    value: float
    forget: float = FORGET
    weight: float = field(default=1.0)

    def add(self, value: float) -> None:
        self.weight = self.weight * self.forget + 1.0
        self.value += (value - self.value) / self.weight


class CostModel:
    """`emoe.scheduling.protocol.Costs`, from a profile and the steps since. Seconds; not thread-safe."""

    def __init__(
        self,
        shape: RoutingShape | None,
        shares: Callable[[str | None], Array | None],
        resident: Callable[[], Array | None],
        *,
        token_s: float,
        prefill_token_s: float,
        expert_load_s: float,
        step_s: float = 0.0,
        kv_token_s: float = 0.0,
    ) -> None:
        """Start with a profile's times.

        Args:
            shape: how the model routes, None where nothing is known (then loads are expected to stay what they were).
            shares: task -> float [layers, experts], the share of its tokens that each expert gets; rows sum to k. None
                for a task without: all experts alike. Asked once for each task.
            resident: bool [layers, experts], what is there now; None: everything.
            token_s: for one request's token of a step.
            prefill_token_s: for an input token.
            expert_load_s: waiting for one expert.
            step_s: for a step, whatever it does.
            kv_token_s: for reading one token of KV memory.
        """
        self._shape, self._shares, self._resident = shape, shares, resident
        self._untouched: dict[str | None, Array] = {}
        units = [token_s, token_s, prefill_token_s, token_s * KV_SHARE]
        self._fit = Fit([step_s, token_s, prefill_token_s, kv_token_s], units, FORGET)
        self._load = Fit([expert_load_s], [expert_load_s], FORGET)
        self._admission = _Mean(0.0)
        self._batch = _Mean(1.0)
        self._loads = _Mean(0.0)
        self.steps = 0

    # -- what is known --------------------------------------------------------------------------------------

    @property
    def token_s(self) -> float:
        """c of Equation 3: what a decoded token takes, its share of the step's own time included, without loads."""
        step_s, token_s, _, _ = self._fit.values
        return token_s + step_s / max(1.0, self._batch.value)

    @property
    def expert_load_s(self) -> float:
        """Waiting for one expert, less what computing hides of it."""
        return self._load.values[0]

    @property
    def admission_load_s(self) -> float:
        """dE of Equation 3: the loading that an admission caused, the mean of the latest."""
        return self._admission.value

    def as_dict(self) -> dict[str, float]:
        """Every coefficient, for logs, metrics and simulations."""
        step_s, token_s, prefill_token_s, kv_token_s = self._fit.values
        return {
            "step_s": step_s,
            "token_s": token_s,
            "prefill_token_s": prefill_token_s,
            "kv_token_s": kv_token_s,
            "expert_load_s": self.expert_load_s,
            "admission_load_s": self.admission_load_s,
            "mean_batch": self._batch.value,
            "steps": float(self.steps),
        }

    # -- learning -------------------------------------------------------------------------------------------

    def observe(self, step: Step) -> None:
        """Correct the coefficients by a step that has ended. Steps that did nothing are ignored."""
        tokens = step.decode_tokens + step.prefill_tokens
        if not tokens or not step.seconds > 0:
            return
        self.steps += 1
        wait_s = min(max(step.wait_s, 0.0), step.seconds)
        self._fit.observe([1.0, step.decode_tokens, step.prefill_tokens, step.kv_tokens], step.seconds - wait_s)
        if step.loads:
            self._load.observe([float(step.loads)], wait_s)
        if step.decode_tokens:
            self._batch.add(step.decode_tokens)
        self._loads.add(step.loads)

    def observe_admission(self, load_s: float) -> None:
        """Note the loading that an admission has caused."""
        self._admission.add(max(0.0, load_s))

    # -- expecting ------------------------------------------------------------------------------------------

    def compute_s(self, decode_tokens: int, prefill_tokens: int = 0, kv_tokens: int = 0) -> float:
        """A step without waiting for experts."""
        step_s, token_s, prefill_token_s, kv_token_s = self._fit.values
        return step_s + decode_tokens * token_s + prefill_tokens * prefill_token_s + kv_tokens * kv_token_s

    def step_s(self, requests: Sequence[Request]) -> float:
        """One step in which each of these decodes one token, its expected loads included; 0 for none."""
        if not requests:
            return 0.0
        kv_tokens = sum(each.input_tokens + each.output_tokens for each in requests)
        loads = self.loads(Counter(each.task for each in requests).items())
        return self.compute_s(len(requests), 0, kv_tokens) + loads * self.expert_load_s

    def prefill_s(self, tokens: int) -> float:
        """Reading that many input tokens beside what else a step does, without loads."""
        return tokens * self._fit.values[2]

    def load_s(self, request: Request, running: Sequence[Request]) -> float:
        """Loading what this request's input needs and neither is resident nor needed by the running in that step."""
        tokens = Counter(each.task for each in running)
        before = self.loads(tokens.items())
        tokens[request.task] += request.input_tokens
        return max(0.0, self.loads(tokens.items()) - before) * self.expert_load_s

    def loads(self, tokens: Iterable[tuple[str | None, float]]) -> float:
        """Experts that a step is expected to load which runs so many tokens of each of these tasks."""
        if self._shape is None:
            return self._loads.value
        missing = self.missing()
        if missing is None:
            return 0.0
        left = self.untouched(tokens)
        return float(missing.sum() - left[missing].sum())

    def missing(self) -> Array | None:
        """bool [layers, experts]: what is not resident; None where all is."""
        resident = self._resident()
        return None if resident is None else ~resident

    def untouched(self, tokens: Iterable[tuple[str | None, float]]) -> Array:
        """float [layers, experts]: the chance that a step with so many tokens of each of these tasks leaves a key be.

        Raises:
            ValueError: no shape is known.
        """
        if self._shape is None:
            raise ValueError("a cost model without a routing shape knows no expert keys.")
        total = np.zeros((self._shape.layers, self._shape.experts))
        for task, count in tokens:
            total += count * self._log_untouched(task)
        return np.exp(total)

    def _log_untouched(self, task: str | None) -> Array:
        found = self._untouched.get(task)
        if found is None and self._shape is not None:
            if len(self._untouched) >= MOST_TASKS:  # labels are the clients' to choose
                self._untouched.clear()
            shares = self._shares(task)
            shares = self._shape.uniform() if shares is None else shares
            found = self._untouched[task] = np.log(np.maximum(1.0 - shares, SURE))
        if found is None:
            raise ValueError("a cost model without a routing shape knows no expert keys.")
        return found
