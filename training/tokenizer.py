"""A byte-level BPE tokenizer of 4,096 entries, trained on the training side of the same examples."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from training.data import Example
from training.templates import TRAIN, render

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (PAD, SYSTEM, USER, ASSISTANT, END)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# Words with their leading space, single digits, runs of spaces (indentation), line ends, the rest.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\d| ?[^\s\p{L}\d]+|\n+| +(?! \S)|\s+"


def texts(examples: list[Example]) -> Iterator[str]:
    for i, e in enumerate(examples):
        if not e.held_out and not e.source.endswith(("cloze", "quote", "made")):
            yield render(e.task, e.fields, i % len(TRAIN[e.task]))
            yield e.answer


def train_tokenizer(examples: list[Example], size: int = 4096) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(t, special=True) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(examples), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def prompt_text(prompt: str) -> str:
    """What the chat template makes of one user turn."""
    return f"{USER}{prompt}{END}{ASSISTANT}"
