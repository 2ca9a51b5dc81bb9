"""How good a model's answers stay when experts are missing: what the quality experiments share.

Texts  which prompts, in which order, and what is judged after each: the full model's greedy answer, or the reference
Way    how the engine runs: mode, predictor, p, what it is told
judged     every text fed token by token as decoding would: is each token the likeliest, and how likely is it
similar    whole answers, running freely, beside the full model's, by the sentence encoder (the paper's accuracy)

Both are kept in cells that experiments share; numbers are kept for each prompt, so sums by task come afterwards
(`accuracy`).
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

import emoe
from emoe.bench.reproduce.accuracy import Accuracy, Judged, Similar
from emoe.bench.reproduce.needs import references
from emoe.bench.reproduce.rivals import AT_ONCE, rivals
from emoe.bench.reproduce.room import refusal
from emoe.bench.reproduce.workbench import Workbench
from emoe.checkpoint.codecs.formats import NATIVE
from emoe.config import Mode, Prefetch
from emoe.errors import BudgetError, UnsupportedModelError, UsageError
from emoe.model import label_task
from emoe.model.bind import binding_of
from emoe.prediction.protocol import Trainable
from emoe.prediction.registry import NETWORKS, PREDICTORS, make_predictor
from emoe.profiling.prompts import first_of_each
from emoe.profiling.running import answer, device_of
from emoe.profiling.settings import encoder_folder
from emoe.tasks.profile import Profile
from emoe.tasks.sensitivity import Sensitivity

Kind = Literal["answers", "references"]
Order = Literal["shuffled", "blocks"]
Memory = str | int | None
"""Of the experts, as `emoe.load` takes it; None: all resident."""

PROCESS_S = 120.0
_KEPT = (
    "rerouted_share",
    "plans",
    "hit_rate",
    "predictions",
    "prefetch",
    "bytes_read",
    "peak_resident_bytes",
    "total_expert_bytes",
)


@dataclass(frozen=True, slots=True)
class Texts:
    """What is judged. kind: the full model's own answers, or the prompts' references; per_task: prompts of each task,
    the first ones; tokens: of a text at most; order: tasks shuffled by the run's seed, or one after another."""

    kind: Kind = "answers"
    per_task: int = 20
    tokens: int = 24
    order: Order = "shuffled"


@dataclass(frozen=True, slots=True)
class Way:
    """How the engine runs.

    label: prompts carry their task; sensitivity: the profile's is used, else every layer of every task is sensitive;
    the rest as `emoe.load` has it (p: replan_prompts; threshold: sensitivity_threshold).
    """

    predictor: str | None = None
    p: int = 1
    mode: Mode = "resident"
    label: bool = True
    sensitivity: bool = True
    prefetch: Prefetch | None = None
    threshold: float | None = None
    expert_dtype: str = NATIVE


FULL = Way(mode="exact")
OURS = Way("task-popularity")
"""What a request gets that names its task: a plan for every prompt."""
OURS_40 = Way("task-popularity", p=40)
AGNOSTIC = Way("static", label=False, sensitivity=False)
"""Neither the prompt's task nor sensitivity is known: one plan for everything."""


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt, its text to be judged, and the full model's whole greedy answer."""

    task: str
    ids: list[int]
    text: list[int]
    answer: list[int]


Request = tuple[Texts, Way, Memory]


def judged(bench: Workbench, requests: Sequence[Request]) -> list[Judged]:
    """Every request's figures, in order; what another experiment has measured is not measured again."""
    fit = [each for each in requests if _too_large(bench, each) is None]
    made = iter([Judged(**each) for each in bench.cells("judged", [_key(*each) for each in fit], _judger(bench))])
    # What does not fit this run's memory is not kept: another run may have more.
    return [
        next(made) if (why := _too_large(bench, each)) is None else Judged([], [], [], [], {}, why) for each in requests
    ]


def similar(bench: Workbench, requests: Sequence[Request]) -> list[Similar]:
    """How alike the whole answers are, for every request; `NO_ENCODER` is the note where it cannot be measured."""
    if encoder_folder() is None:
        if bench.frozen and (bench.work / "cells" / "similar").is_dir():
            raise UsageError('this run measured similarity: judging it again needs pip install "emoe[similarity]".')
        return [Similar([], None) for _ in requests]
    fit = [each for each in requests if _too_large(bench, each) is None]
    made = iter([Similar(**each) for each in bench.cells("similar", [_key(*each) for each in fit], _comparer(bench))])
    return [next(made) if _too_large(bench, each) is None else Similar([], None) for each in requests]


def accuracies(bench: Workbench, requests: Sequence[Request]) -> list[Accuracy]:
    """Both measures for every request."""
    return [Accuracy(*each) for each in zip(judged(bench, requests), similar(bench, requests), strict=True)]


def _too_large(bench: Workbench, request: Request) -> str | None:
    """Why its experts do not fit; exact mode without a share runs in as much as there is, with the same answers."""
    _, way, memory = request
    return None if memory is None and way.mode == "exact" else refusal(bench, memory)


def answers_of(bench: Workbench) -> Texts:
    """The texts by which experiments with own answers are compared: the same ones, so that cells are shared."""
    return Texts("answers", per_task=bench.pick(4, 15), tokens=bench.pick(16, 24))


def items(bench: Workbench, texts: Texts) -> list[Item]:
    """The prompts to score with their texts, in their order; prompts without a text are left out.

    Raises:
        UsageError: no prompt has a reference, and references are asked for.
    """
    if texts.kind == "references":
        references(bench, texts.per_task)
    prompts, ids = bench.prompts["score"], bench.ids("score")
    _, answers = bench.recorded("score")
    tokenizer = bench.tokenizer if texts.kind == "references" else None
    found = []
    for index in first_of_each(prompts, texts.per_task):
        prompt, given = prompts[index], list(answers[index].ids)
        if tokenizer is None:
            text = given
        else:
            text = tokenizer.encode(prompt.reference, add_special_tokens=False) if prompt.reference else []
        if text:
            found.append(Item(prompt.task, ids[index], text[: texts.tokens], given))
    random.Random(bench.settings.seed).shuffle(found)
    if texts.order == "blocks":
        found.sort(key=lambda item: bench.tasks.index(item.task))  # stable: still shuffled within a task
    return found


def judge(model: Any, item: Item) -> tuple[int, float]:
    """Tokens of the text that are the likeliest, and its negative log-likelihood, fed as decoding would feed it.

    `profiling.running.judge` reads a text in one pass: faster, but a pass with a plan of its own would see it whole.
    """
    device = device_of(model)
    out = model(input_ids=torch.tensor([item.ids], device=device), use_cache=True)
    agreed, nll = 0, 0.0
    for number, token in enumerate(item.text):
        logits = out.logits[0, -1].float()
        agreed += int(int(logits.argmax()) == token)
        nll -= float(torch.log_softmax(logits, -1)[token])
        if number + 1 < len(item.text):
            step = torch.tensor([[token]], device=device)
            out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
    return agreed, nll


def profile_for(bench: Workbench, way: Way) -> Profile:
    """The profile with what the way's predictor has learned, and without what the way is not told."""
    profile = bench.profile
    wanted = (way.predictor or "").removeprefix(AT_ONCE)
    unlearned = wanted in PREDICTORS and wanted not in profile.predictors
    if unlearned and isinstance(make_predictor(wanted, profile.shape), Trainable):
        profile = bench.trained(wanted)
    if way.sensitivity:
        return profile
    return dataclasses.replace(profile, sensitivity=Sensitivity.unknown(profile.shape.layers))


def options(bench: Workbench, way: Way, memory: Memory) -> dict[str, Any]:
    """What `emoe.load` is given."""
    given: dict[str, Any] = {
        "expert_memory": bench.budget if memory is None else memory,
        "mode": way.mode,
        "replan_prompts": way.p,
    }
    if way.expert_dtype != NATIVE:
        given |= {"expert_dtype": way.expert_dtype, "expert_cache": bench.work / "experts"}
    if way.predictor is not None or way.mode == "balanced":
        given |= {"predictor": way.predictor, "profile": profile_for(bench, way)}
    if way.prefetch is not None:
        given["prefetch"] = way.prefetch
    if way.threshold is not None:
        given["sensitivity_threshold"] = way.threshold
    return given


def _key(texts: Texts, way: Way, memory: Memory) -> dict[str, Any]:
    return {"texts": dataclasses.asdict(texts), "way": dataclasses.asdict(way), "memory": memory}


def _judger(bench: Workbench) -> Any:
    @torch.no_grad()
    def compute(texts: dict[str, Any], way: dict[str, Any], memory: Memory) -> dict[str, Any]:
        chosen, how = items(bench, Texts(**texts)), Way(**way)
        given = options(bench, how, memory)
        each: list[tuple[int, float]] = []
        try:
            with rivals(bench.settings.seed), bench.model(**given) as (model, _):
                _plan_whatever_it_costs(model)
                if how.predictor in NETWORKS:
                    _await_process(model)
                start = time.perf_counter()
                for item in chosen:
                    label_task(model, item.task if how.label else None)
                    each.append(judge(model, item))
                seconds = time.perf_counter() - start
                stats = emoe.stats(model)
        except (BudgetError, UnsupportedModelError) as error:
            return {"tasks": [], "tokens": [], "agreed": [], "nll": [], "stats": {}, "refused": str(error)}
        return {
            "tasks": [item.task for item in chosen],
            "tokens": [len(item.text) for item in chosen],
            "agreed": [agreed for agreed, _ in each],
            "nll": [nll for _, nll in each],
            "stats": {name: stats[name] for name in _KEPT} | {"seconds": seconds},
        }

    return compute


def _comparer(bench: Workbench) -> Any:
    from emoe.profiling.similarity import SentenceEncoder

    encoders: list[SentenceEncoder] = []  # loaded once, and not where nothing is to be compared

    @torch.no_grad()
    def compute(texts: dict[str, Any], way: dict[str, Any], memory: Memory) -> dict[str, Any]:
        chosen, how = items(bench, Texts(**texts)), Way(**way)
        given = options(bench, how, memory)
        encoder = encoders[0] if encoders else SentenceEncoder()
        encoders[:] = [encoder]
        values = []
        try:
            with rivals(bench.settings.seed), bench.model(**given) as (model, tokenizer):
                _plan_whatever_it_costs(model)
                for item in chosen:
                    label_task(model, item.task if how.label else None)
                    said = [item.answer, answer(model, item.ids, bench.new_tokens).ids]
                    first, second = (tokenizer.decode(each, skip_special_tokens=True) for each in said)
                    values += [100.0 * each for each in encoder.similarities(first, [second])]
        except (BudgetError, UnsupportedModelError):
            return {"tasks": [], "values": None}  # `judged` says why
        return {"tasks": [item.task for item in chosen], "values": values}

    return compute


def _await_process(model: Any) -> None:
    """A network's process takes seconds to start, longer than a short run."""
    until = time.monotonic() + PROCESS_S
    while not emoe.stats(model)["predictions"]["memory_bytes"] and time.monotonic() < until:
        time.sleep(0.05)


def _plan_whatever_it_costs(model: Any) -> None:
    """What a predictor costs is another question (section 5.7): plans do not switch themselves off."""
    binding_of(model).ahead.worth.judging = False
