"""Tokens per expert for each prompt, without the order of tokens: what some published routing data holds.

An .npz file with `counts` uint [prompts, layers, experts], `n_tokens` int [prompts], and for labels `subject` int
[prompts], an index into `subjects`. Every token counts once for each of its k experts.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emoe.routing.trace import DECODE, Array, Trace, TraceError, id_dtype, load_arrays, missing_id


@dataclass(frozen=True, eq=False)
class PromptCounts:
    """Counts of many prompts.

    Attributes:
        counts: int64 [prompts, layers, experts].
        task: int32 [prompts] index into `tasks`, -1 without a label.
        tasks: the labels.
        top_k: experts for each token.
    """

    counts: Array
    task: Array
    tasks: tuple[str, ...]
    top_k: int

    @property
    def num_prompts(self) -> int:
        """Prompts."""
        return len(self.counts)

    def task_of(self, prompt: int) -> str | None:
        """The prompt's label, None where it has none."""
        index = int(self.task[prompt])
        return None if index < 0 else self.tasks[index]

    def select(self, prompts: Sequence[int]) -> PromptCounts:
        """The counts of these prompts alone, in the order given."""
        chosen = np.asarray(prompts, dtype=np.int64)
        return dataclasses.replace(self, counts=self.counts[chosen], task=self.task[chosen])

    def without_tasks(self) -> PromptCounts:
        """The same without labels."""
        return dataclasses.replace(self, task=np.full_like(self.task, -1), tasks=())

    def without_prefix(self) -> PromptCounts:
        """Less what all prompts of a label have in common: the element-wise minimum over them.

        Prompts of one label may begin with the same long text (examples to follow). Its tokens come first and are
        routed alike in each, so they are part of every prompt's counts and would make any predictor look good.
        """
        counts = self.counts.copy()
        for label in np.unique(self.task[self.task >= 0]):
            rows = self.task == label
            counts[rows] -= counts[rows].min(axis=0)
        return dataclasses.replace(self, counts=counts)

    def as_trace(self, seed: int = 0) -> Trace:
        """Tokens that add up to these counts, for predictors, which learn from routes.

        Which experts go together in a token, and in which order tokens come, is made up: drawn at random for each
        layer. No expert comes twice for a token; where a layer's counts add up to fewer than another's, some places
        say "not computed".
        """
        rng = np.random.default_rng(seed)
        prompts, layers, experts = self.counts.shape
        dtype = id_dtype(experts)
        ids = np.tile(np.append(np.arange(experts), missing_id(dtype)), layers).astype(dtype)
        made, lengths = [], []
        for counts in self.counts:
            sums = counts.sum(axis=1)
            tokens = int(max(-(-sums.max() // self.top_k), counts.max(initial=0)))
            filled = np.column_stack([counts, tokens * self.top_k - sums])
            # Equal ids lie side by side, at most one for each token, so a column of this never holds one twice.
            routes = np.repeat(ids, filled.ravel()).reshape(layers, self.top_k, tokens)
            mixed = np.argsort(rng.random((layers, 1, tokens)), axis=2)
            made.append(np.take_along_axis(routes, mixed, axis=2).transpose(2, 0, 1))
            lengths.append(tokens)
        offsets = np.cumsum([0, *lengths]).astype(np.int64)
        return Trace(
            experts=np.concatenate(made) if made else np.zeros((0, layers, self.top_k), dtype),
            phase=np.full(offsets[-1], DECODE, dtype=np.uint8),
            step=np.arange(offsets[-1], dtype=np.int64),
            offsets=offsets,
            task=self.task,
            tasks=self.tasks,
            layers=np.arange(layers, dtype=np.int32),
            num_experts=experts,
            prompts=tuple({} for _ in range(prompts)),
            source={"layout": "counts, the order of tokens made up"},
        )


def file_of(path: Path | str) -> Path:
    """The file of counts: `path` itself, or the `counts.npz` of a folder."""
    path = Path(path)
    return path / "counts.npz" if path.is_dir() else path


def holds_counts(path: Path | str) -> bool:
    """Whether there is a file of counts, rather than a trace, at `path`."""
    path = Path(path)
    if path.is_dir():
        return (path / "counts.npz").exists() and not (path / "trace.npz").exists()
    try:
        with zipfile.ZipFile(path) as archive:
            return "counts.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False  # whoever reads it as a trace says what is wrong


def read_counts(path: Path | str) -> PromptCounts:
    """Read counts.

    Raises:
        TraceError: the file is missing, damaged or contradicts itself.
    """
    file = file_of(path)
    arrays = load_arrays(file)
    absent = sorted({"counts", "n_tokens"} - arrays.keys())
    if absent:
        raise TraceError(f"{file} lacks {', '.join(absent)}: counts need both counts and n_tokens for each prompt")
    counts, tokens = arrays["counts"], arrays["n_tokens"]
    if counts.ndim != 3 or counts.dtype.kind not in "iu" or tokens.shape != counts.shape[:1]:
        raise TraceError(f"{file}: counts {counts.dtype} {list(counts.shape)} do not fit {list(tokens.shape)} n_tokens")
    sums = counts.sum(axis=2, dtype=np.int64)
    first = int(np.argmax(tokens > 0)) if sums.size else 0  # prompts without a token say nothing of k
    top_k = int(sums[first, 0] // max(1, int(tokens[first]))) if sums.size else 0
    if top_k < 1 or bool((sums != tokens[:, None] * top_k).any()):
        raise TraceError(f"{file}: counts do not add up to n_tokens x {top_k} in every layer; the file is damaged")
    task = arrays.get("subject", np.full(len(counts), -1))
    tasks = tuple(str(name) for name in arrays.get("subjects", ()))
    if task.shape != tokens.shape or (task.size and not -1 <= int(task.min()) <= int(task.max()) < max(1, len(tasks))):
        raise TraceError(f"{file}: subject does not name one of {len(tasks)} subjects for {len(counts)} prompts")
    return PromptCounts(counts.astype(np.int64), task.astype(np.int32), tasks, top_k)
