"""Examples -> packed token batches, every task in every batch."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from training.data import Example
from training.model import Buckets
from training.templates import TRAIN, render
from training.tokenizer import END, prompt_text

MAX_TOKENS = 384
PROMPT_WEIGHT = 0.25  # prompts are most of the English there is
# Share of the tokens of a batch.
SHARES = {
    "summarise": 0.15, "classify": 0.08, "qa": 0.09, "ask": 0.12,
    "compare": 0.11, "converse": 0.16, "code": 0.14, "maths": 0.15,
}  # fmt: skip
# The first token of such an answer holds nearly all there is to learn: at weight 5 neither task had learnt
# more than its labels' frequencies after 1.5 epochs, at 20 and 30 both had half an epoch later.
LABEL_WEIGHTS = {"classify": 15.0, "compare": 25.0}
# Inside a task: the real examples, and what is made from the same texts.
PARTS = {
    "qa": {
        "XQuAD": 0.35, "XQuAD, cloze": 0.15, "SciTLDR, cloze": 0.15,
        "SQuAD, quote": 0.15, "SQuAD, year": 0.14, "SQuAD, number": 0.06,
    },
    "compare": {"STS-B": 0.8, "STS-B, made": 0.2},
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    task: str
    ids: list[int]
    prompt_tokens: int

    def weights(self) -> list[float]:
        """Of predicting token i + 1 at position i. Short answers count more, or they would drown."""
        answer = len(self.ids) - self.prompt_tokens
        weight = min(5.0, max(1.0, 20.0 / answer))
        first = LABEL_WEIGHTS.get(self.task, weight)
        return [PROMPT_WEIGHT] * (self.prompt_tokens - 1) + [first] + [weight] * (answer - 1) + [0.0]


def encode(tokenizer: PreTrainedTokenizerFast, task: str, prompt: str, answer: str) -> Document:
    """Too long a prompt loses its middle, too long an answer its end (and then its end token)."""
    head: list[int] = tokenizer.encode(prompt_text(prompt), add_special_tokens=False)
    tail: list[int] = tokenizer.encode(answer + END, add_special_tokens=False)
    tail = tail[:224]
    room = MAX_TOKENS - len(tail)
    if len(head) > room:
        head = head[: room // 2] + head[len(head) - (room - room // 2) :]
    return Document(task, head + tail, len(head))


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    targets: Tensor
    weights: Tensor
    answer: Tensor
    task: Tensor
    document: Tensor
    buckets: Buckets
    tokens: int


def pack(documents: list[Document], size: int, device: torch.device, tasks: tuple[str, ...] = tuple(SHARES)) -> Batch:
    """Documents one after another, then padding up to `size` tokens that no loss and no balance counts."""
    ids, targets, weights, answer, task, index = [], [], [], [], [], []
    lengths = []
    for n, d in enumerate(documents):
        ids += d.ids
        targets += [*d.ids[1:], 0]
        weights += d.weights()
        answer += [i >= d.prompt_tokens - 1 and i < len(d.ids) - 1 for i in range(len(d.ids))]
        task += [tasks.index(d.task)] * len(d.ids)
        index += [n] * len(d.ids)
        lengths.append(len(d.ids))
    used = len(ids)
    gap = size - used
    lengths += [min(64, gap - s) for s in range(0, gap, 64)]

    def tensor(values: list[Any], fill: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values + [fill] * gap, dtype=dtype).to(device)

    return Batch(
        tensor(ids, 0, torch.long), tensor(targets, 0, torch.long), tensor(weights, 0.0, torch.float),
        tensor(answer, False, torch.bool), tensor(task, -1, torch.long), tensor(index, -1, torch.long),
        Buckets.of(lengths, device), used,
    )  # fmt: skip


@dataclass
class Stream:
    """One source's examples in a random order, again and again, each time in another phrasing."""

    examples: list[Example]
    order: list[int] = field(default_factory=list)
    drawn: int = 0

    def next(self, rng: random.Random) -> Example:
        if not self.order:
            self.order = list(range(len(self.examples)))
            rng.shuffle(self.order)
        self.drawn += 1
        return self.examples[self.order.pop()]


class Mixer:
    def __init__(self, examples: list[Example], tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> None:
        self.tokenizer, self.size, self.rng = tokenizer, size, random.Random(seed)
        self.streams: dict[str, Stream] = {}
        self.shares: dict[str, float] = {}
        for task, share in SHARES.items():
            mine = [e for e in examples if e.task == task and not e.held_out]
            parts = PARTS.get(task, {"": 1.0})
            for source, part in parts.items():
                name = f"{task}/{source}"
                self.streams[name] = Stream([e for e in mine if not source or e.source == source])
                self.shares[name] = share * part
        self.given = {name: 0.0 for name in self.shares}
        self.left: list[Document] = []

    def draw(self) -> Document:
        """From the source that is furthest behind its share of the tokens."""
        name = min(self.shares, key=lambda n: self.given[n] / self.shares[n])
        example = self.streams[name].next(self.rng)
        phrasing = self.rng.randrange(len(TRAIN[example.task]))
        document = encode(self.tokenizer, example.task, render(example.task, example.fields, phrasing), example.answer)
        self.given[name] += len(document.ids)
        return document

    def next(self) -> list[Document]:
        """Documents of at most `size` tokens; what does not fit waits for the next batch."""
        batch: list[Document] = []
        waiting: list[Document] = []
        used = 0
        while self.size - used > 24 and len(waiting) < 12:
            document = self.left.pop() if self.left else self.draw()
            if used + len(document.ids) <= self.size:
                batch.append(document)
                used += len(document.ids)
            else:
                waiting.append(document)
        self.left += waiting
        self.rng.shuffle(self.left)
        return batch

    def epochs(self) -> dict[str, float]:
        return {n: round(s.drawn / max(1, len(s.examples)), 2) for n, s in self.streams.items()}

    def state(self) -> dict[str, Any]:
        return {
            "rng": self.rng.getstate(), "given": self.given, "left": self.left,
            "streams": {n: (s.order, s.drawn) for n, s in self.streams.items()},
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self.rng.setstate(state["rng"])
        self.left = state["left"]
        total = sum(state["given"].values())
        self.given = {name: share * total for name, share in self.shares.items()}  # the shares may be new
        for name, (order, drawn) in state["streams"].items():
            if name not in self.streams:
                continue
            self.streams[name].order, self.streams[name].drawn = order, drawn
