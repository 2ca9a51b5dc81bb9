"""Learning an eviction rule from recorded routes before a benchmark, into a profile as `emoe profile` makes one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from emoe.bench.plant.history import check_history
from emoe.checkpoint.fingerprint import fingerprint
from emoe.errors import UsageError
from emoe.planner import facts_of
from emoe.prediction.protocol import RoutingShape, Trainable
from emoe.prediction.registry import SCORERS
from emoe.profiling.training import make, train
from emoe.routing.trace import Trace
from emoe.tasks.keywords import OTHER, Keywords
from emoe.tasks.profile import PredictorStates, Profile
from emoe.tasks.sensitivity import Sensitivity

Say = Callable[[str], None]


@contextmanager
def learned(folder: Path, history: str | None, evictions: Sequence[str], say: Say) -> Iterator[str | None]:
    """The folder of a profile that holds what those of `evictions` that learn made of `history`, for as long as the
    context lasts; None without a history.

    Raises:
        UsageError: nothing here learns; the history is another model's, too short, or holds what is fed.
        TraceError: it is missing or damaged.
    """
    if history is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="emoe-history-") as scratch:
        yield str(profile_of(folder, history, evictions, Path(scratch), say))


def profile_of(folder: Path, history: str | Path, evictions: Sequence[str], out: Path, say: Say) -> Path:
    """Write to `out` a profile of the checkpoint in `folder`: what `evictions` learn from `history`.

    Task labels are hidden: what is fed to a benchmark has none.

    Raises:
        UsageError, TraceError: as `learned`.
    """
    shape = _shape_of(folder)
    known = Trace.read(history, num_experts=shape.experts)
    trace = replace(known, task=np.full_like(known.task, -1), tasks=())
    if RoutingShape.of(trace) != shape:
        raise UsageError(f"{history} was routed as {RoutingShape.of(trace)}, and {folder} routes as {shape}")
    scorers = [name for name in dict.fromkeys(evictions) if name in SCORERS]
    names = [name for name in scorers if isinstance(make(name, shape), Trainable)]
    if not names:
        raise UsageError(
            f"--history is for eviction rules that learn, as next-use; {', '.join(evictions) or 'the default'} learns "
            "nothing: name one that does with --eviction, or leave --history out"
        )
    check_history(folder, trace, history)
    say(f"learning {', '.join(names)} from {len(trace)} tokens of {trace.num_prompts} prompts")
    states = train(names, trace, out / "learned", 0, say)
    profile = Profile(
        fingerprint=fingerprint(folder),
        shape=shape,
        tasks=(),
        keywords=Keywords({}),
        lengths={},
        sensitivity=Sensitivity.unknown(shape.layers),
        popularity={OTHER: trace.shares()},
        predictors=PredictorStates(states),
        tokens={OTHER: len(trace)},
        source={"model": str(folder), "history": str(history), "prompts": trace.num_prompts},
    )
    return profile.write(out / "profile")


def _shape_of(folder: Path) -> RoutingShape:
    """How the checkpoint's layers route."""
    facts = facts_of(folder)[1]
    return RoutingShape(len(facts.expert_layers), max(each.experts for each in facts.expert_layers), facts.top_k)
