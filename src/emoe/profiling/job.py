"""Make a profile, stage by stage. Each stage keeps what it has in the work folder, so a stopped run can go on.

record       answer every prompt, keep the routes        work/routes/
sensitivity  random routing, prefix by prefix            work/sensitivity.jsonl
predictors   train them on the routes                    work/predictors/
timings      time loads; then the profile is written and the work folder removed
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import emoe
from emoe.checkpoint.codecs.formats import NATIVE
from emoe.checkpoint.fingerprint import fingerprint
from emoe.checkpoint.index import ExpertIndex
from emoe.checkpoint.whole import write_whole
from emoe.errors import UsageError
from emoe.model.bind import binding_of
from emoe.prediction.protocol import RoutingShape
from emoe.profiling import sensitivity as sensing
from emoe.profiling.prompts import Prompt, digest, encode_all, first_of_each, tasks_of
from emoe.profiling.record import record
from emoe.profiling.running import Answer
from emoe.profiling.settings import ENCODER, JOB, WORK, ProfileSettings
from emoe.profiling.similarity import SentenceEncoder
from emoe.profiling.timings import measure_timings
from emoe.profiling.training import train
from emoe.routing.trace import Trace
from emoe.tasks.keywords import OTHER, Keywords
from emoe.tasks.lengths import Lengths
from emoe.tasks.profile import PredictorStates, Profile
from emoe.tasks.sensitivity import THRESHOLD, Sensitivity

Step = Callable[[str, int, int], None]
"""Called with (stage, done, in all); stages without steps report text through `Say`."""
Say = Callable[[str], None]


def make_profile(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: ProfileSettings,
    out: Path,
    *,
    name: str,
    step: Step,
    say: Say,
) -> Profile:
    """Make the profile of a model loaded by `emoe.load` in mode "exact", and write it to `out`.

    `settings` have been through `check_settings` and `out` through `check_out`. Killed or interrupted, a second call
    goes on where the first stopped.

    Raises:
        UsageError: prompts that do not fit the model, or a run begun with other prompts, settings or weights.
        ReadError: an expert could not be read.
        ProfileError: the profile cannot be written.
    """
    binding = binding_of(model)
    if binding.runtime.mode != "exact":
        raise UsageError("a profile is made in mode 'exact': it compares answers with the full model's.")
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    ids = encode_all(prompts, tokenizer, name, context, settings.new_tokens)
    weights = fingerprint(binding.index.path)
    work = out / WORK
    _begin(work, _job(binding.index, weights, prompts, settings))

    trace, answers = record(
        model, prompts, ids, settings.new_tokens, work / "routes", lambda done, total: step("prompts", done, total)
    )
    curves = _sensitivity(model, tokenizer, prompts, ids, answers, settings, work, step)
    states = train(settings.predictors, trace, work / "predictors", settings.seed, say)
    profile = Profile(
        fingerprint=weights,
        shape=RoutingShape.of(trace),
        tasks=tasks_of(prompts),
        keywords=Keywords.learn([(prompt.task, prompt.text) for prompt in prompts]),
        lengths=_lengths(prompts, answers),
        sensitivity=curves,
        popularity=trace.shares_by_task() | {OTHER: trace.shares()},
        predictors=PredictorStates(states),
        timings=measure_timings(model, [len(each) for each in ids], answers, seed=settings.seed),
        tokens=_tokens(trace),
        source=_source(name, prompts, settings) | {"expert_dtype": binding.index.expert_dtype},
    )
    profile.write(out)
    shutil.rmtree(work)
    return profile


def _job(index: ExpertIndex, weights: str, prompts: Sequence[Prompt], settings: ProfileSettings) -> dict[str, Any]:
    """What a run is of. A form of the experts that changes no number needs no word."""
    job = {"fingerprint": weights, "prompts": digest(prompts), "settings": _plain(settings)}
    return job if index.expert_dtype == NATIVE else {**job, "expert_dtype": index.expert_dtype}


def _begin(work: Path, job: dict[str, Any]) -> None:
    """Note what this run is of; a run that goes on must be of the same."""
    file = work / JOB
    if not file.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(job, indent=1).encode())
        return
    before = json.loads(file.read_bytes())
    other = [key for key in {**before, **job} if before.get(key) != job.get(key)]
    if other:
        raise UsageError(
            f"{work.parent} was begun with other {' and '.join(other)}: go on with the same MODEL, --prompts and "
            f"options, or remove {work.parent}."
        )


def _plain(settings: ProfileSettings) -> dict[str, Any]:
    return dataclasses.asdict(settings) | {"predictors": list(settings.predictors)}


def _sensitivity(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    settings: ProfileSettings,
    work: Path,
    step: Step,
) -> Sensitivity:
    layers = len(binding_of(model).index.layers)
    if not settings.sensitivity_prompts:
        return Sensitivity.unknown(layers)
    encoder = SentenceEncoder() if settings.measure == "similarity" else None
    chosen = [(prompts[i], ids[i], answers[i]) for i in first_of_each(prompts, settings.sensitivity_prompts)]
    prefixes = sensing.choose_prefixes(layers, settings.prefixes)
    rows = sensing.measure(
        model,
        tokenizer,
        chosen,
        sensing.Settings(prefixes, settings.new_tokens, settings.seed),
        encoder,
        work / "sensitivity.jsonl",
        lambda done, total: step("sensitivity", done, total),
    )
    return sensing.summarise(rows, layers, prefixes, settings.measure, THRESHOLD)


def _lengths(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, Lengths]:
    """By task, and under `OTHER` of all."""
    found = {}
    for task in (*tasks_of(prompts), OTHER):
        mine = [a for p, a in zip(prompts, answers, strict=True) if task in (p.task, OTHER)]
        found[task] = Lengths.of([len(each.ids) for each in mine], sum(each.cut for each in mine))
    return found


def _tokens(trace: Trace) -> dict[str, int]:
    rows = trace.task[trace.prompt_of_token()]
    return {task: int((rows == i).sum()) for i, task in enumerate(trace.tasks)} | {OTHER: len(trace)}


def _source(name: str, prompts: Sequence[Prompt], settings: ProfileSettings) -> dict[str, Any]:
    return {
        "model": name,
        "prompts": len(prompts),
        "settings": _plain(settings),
        "encoder": ENCODER if settings.measure == "similarity" else None,
        "versions": {"emoe": emoe.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "machine": platform.machine(),
    }
