"""How good a model's answers stay when experts are missing: what the quality experiments share.

Texts  which prompts, in which order, and what is judged after each: the full model's greedy answer, or the reference
Way    how the engine runs: mode, predictor, p, what it is told
judged     every text fed token by token as decoding would: is each token the likeliest, and how likely is it
similar    whole answers, running freely, beside the full model's, by the sentence encoder (the paper's accuracy)

Both are kept in cells that experiments share; numbers are kept for each prompt, so sums by task come afterwards.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

import emoe
from emoe.bench.reproduce.findings import Verdict
from emoe.bench.reproduce.rivals import rivals
from emoe.bench.reproduce.workbench import Workbench
from emoe.checkpoint.codecs.formats import NATIVE
from emoe.config import Mode, Prefetch
from emoe.errors import BudgetError, UnsupportedModelError, UsageError
from emoe.model import label_task
from emoe.model.bind import binding_of
from emoe.prediction.protocol import Trainable
from emoe.prediction.registry import PREDICTORS, make_predictor
from emoe.profiling.prompts import first_of_each
from emoe.profiling.running import answer, device_of
from emoe.profiling.settings import encoder_folder
from emoe.tasks.profile import Profile
from emoe.tasks.sensitivity import Sensitivity

Kind = Literal["answers", "references"]
Order = Literal["shuffled", "blocks"]
Memory = str | int | None
"""Of the experts, as `emoe.load` takes it; None: all resident."""

NO_ENCODER = (
    "similarity of whole answers: not measured, since the sentence encoder is not installed "
    '(pip install "emoe[similarity]").'
)
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


@dataclass(frozen=True, slots=True)
class Judged:
    """What one way made of the texts, a number for each prompt in the order of the texts.

    tasks; tokens: judged; agreed: of them the likeliest; nll: negative log-likelihood of the text; stats: the engine's
    figures and `seconds`; refused: why this way cannot run on this model, and then nothing else is there.
    """

    tasks: list[str]
    tokens: list[int]
    agreed: list[int]
    nll: list[float]
    stats: dict[str, Any]
    refused: str | None = None

    def agreement(self, task: str | None = None) -> float | None:
        """Percent of the tokens (of one task's texts) that are the likeliest; None where the way was refused."""
        return self._ratio(self.agreed, task, 100.0)

    def perplexity(self, task: str | None = None) -> float | None:
        """Of the texts (of one task); None where the way was refused."""
        mean = self._ratio(self.nll, task)
        return None if mean is None else math.exp(mean)

    def _ratio(self, values: Sequence[float], task: str | None, scale: float = 1.0) -> float | None:
        chosen = [i for i, name in enumerate(self.tasks) if task in (None, name)]
        tokens = sum(self.tokens[i] for i in chosen)
        return scale * sum(values[i] for i in chosen) / tokens if tokens else None


@dataclass(frozen=True, slots=True)
class Similar:
    """Similarity of each whole answer to the full model's, in percent; `values` is None where it was not measured."""

    tasks: list[str]
    values: list[float] | None

    def mean(self, task: str | None = None) -> float | None:
        """Over all prompts, or those of one task."""
        if self.values is None:
            return None
        chosen = [value for name, value in zip(self.tasks, self.values, strict=True) if task in (None, name)]
        return float(np.mean(chosen)) if chosen else None


Request = tuple[Texts, Way, Memory]


def judged(bench: Workbench, requests: Sequence[Request]) -> list[Judged]:
    """Every request's figures, in order; what another experiment has measured is not measured again."""
    return [Judged(**value) for value in bench.cells("judged", [_key(*each) for each in requests], _judger(bench))]


def similar(bench: Workbench, requests: Sequence[Request]) -> list[Similar]:
    """How alike the whole answers are, for every request; `NO_ENCODER` is the note where it cannot be measured."""
    if encoder_folder() is None:
        return [Similar([], None) for _ in requests]
    return [Similar(**value) for value in bench.cells("similar", [_key(*each) for each in requests], _comparer(bench))]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Both measures of one way; the paper's is the similarity."""

    judged: Judged
    similar: Similar

    def value(self, task: str | None = None) -> float | None:
        """Percent: the similarity where it was measured, else the agreement; None where the way was refused."""
        return self.judged.agreement(task) if self.similar.values is None else self.similar.mean(task)

    def both(self, task: str | None = None) -> tuple[float | None, float | None]:
        """(similarity, agreement), rounded for a table."""
        return rounded(self.similar.mean(task)), rounded(self.judged.agreement(task))


COLUMNS = ("similarity of whole answers (%)", "token agreement (%)")
"""Of `Accuracy.both`."""


def accuracies(bench: Workbench, requests: Sequence[Request]) -> list[Accuracy]:
    """Both measures for every request."""
    return [Accuracy(*each) for each in zip(judged(bench, requests), similar(bench, requests), strict=True)]


def answers_of(bench: Workbench) -> Texts:
    """The texts by which experiments with own answers are compared: the same ones, so that cells are shared."""
    return Texts("answers", per_task=bench.pick(4, 15), tokens=bench.pick(16, 24))


def measure_name() -> str:
    """What `Accuracy.value` is here, for axes and claims."""
    return "similarity" if encoder_folder() is not None else "token agreement"


def notes(bench: Workbench, found: Sequence[Judged] = ()) -> tuple[str, ...]:
    """What a reader must know beside the numbers; ways that were refused are named with their reason."""
    said = [
        "Accuracy is the paper's: similarity of a whole greedy answer to the one of the same model with every expert "
        f"resident, by a sentence encoder ({bench.new_tokens} tokens at most). Beside it stands the share of the full "
        "model's tokens that are still the likeliest, each given those before it, which needs no encoder."
    ]
    if encoder_folder() is None:
        said.append(f"S{NO_ENCODER[1:]}")
    refused = dict.fromkeys(each.refused for each in found if each.refused is not None)
    return (*said, *(f"A way could not run here: {why}" for why in refused))


def rounded(value: float | None, digits: int = 2) -> float | None:
    """For tables."""
    return None if value is None else round(value, digits)


def graded(flags: Sequence[bool]) -> Verdict:
    """All of what a claim says holds, a part, or nothing."""
    return "holds" if all(flags) else "partly" if any(flags) else "does not hold"


def percent(value: float | None) -> str:
    """For claims."""
    return "not measured" if value is None else f"{value:.1f} %"


SMALL = (
    "the model here is small and routes by task: with one expert missing another word follows, and the rest of a "
    "freely running answer goes its own way. Mixtral's 8 experts a layer serve every task, and its answers survive."
)
"""Why accuracies here are lower than the paper's; the caller says when the model is emoe-nano."""


def items(bench: Workbench, texts: Texts) -> list[Item]:
    """The prompts to score with their texts, in their order; prompts without a text are left out.

    Raises:
        UsageError: no prompt has a reference, and references are asked for.
    """
    from transformers import AutoTokenizer

    prompts, ids = bench.prompts["score"], bench.ids("score")
    _, answers = bench.recorded("score")
    tokenizer = AutoTokenizer.from_pretrained(bench.folder) if texts.kind == "references" else None
    found = []
    for index in first_of_each(prompts, texts.per_task):
        prompt, given = prompts[index], list(answers[index].ids)
        if tokenizer is None:
            text = given
        else:
            text = tokenizer.encode(prompt.reference, add_special_tokens=False) if prompt.reference else []
        if text:
            found.append(Item(prompt.task, ids[index], text[: texts.tokens], given))
    if not found:
        raise UsageError('no prompt to score has a reference: give --prompts with "reference" in its lines.')
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
    for name in set(PREDICTORS) - set(profile.predictors):
        if name == way.predictor and isinstance(make_predictor(name, profile.shape), Trainable):
            profile = bench.trained(name)
    if way.sensitivity:
        return profile
    return dataclasses.replace(profile, sensitivity=Sensitivity.unknown(profile.shape.layers))


def options(bench: Workbench, way: Way, memory: Memory) -> dict[str, Any]:
    """What `emoe.load` is given."""
    given: dict[str, Any] = {"expert_memory": memory, "mode": way.mode, "replan_prompts": way.p}
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
    @torch.no_grad()
    def compute(texts: dict[str, Any], way: dict[str, Any], memory: Memory) -> dict[str, Any]:
        from emoe.profiling.similarity import SentenceEncoder

        chosen, how = items(bench, Texts(**texts)), Way(**way)
        given = options(bench, how, memory)
        encoder = SentenceEncoder()
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


def _plan_whatever_it_costs(model: Any) -> None:
    """What a predictor costs is another question (section 5.7): plans do not switch themselves off."""
    binding_of(model).ahead.worth.judging = False
