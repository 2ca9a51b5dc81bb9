"""From a prompt or a conversation to token ids, the same way everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emoe.errors import UsageError


def encode(
    tokenizer: Any, prompt: str | Sequence[Mapping[str, str]], *, raw: bool = False, name: str = ""
) -> list[int]:
    """Token ids of a prompt or conversation, in the chat template unless `raw` or there is none.

    Raises:
        UsageError: the model (`name`) has no tokenizer, or the prompt holds bytes that are no text.
    """
    if tokenizer is None:
        raise UsageError(
            f"{name or 'the model'} has no tokenizer, so it cannot be given text; use emoe.load and token ids"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:  # Python keeps bytes of a command line that it cannot decode as surrogates
            raise UsageError(f"the prompt is no UTF-8 text: {error}") from error
    if raw or tokenizer.chat_template is None:
        return list(tokenizer("\n".join(message["content"] for message in messages)).input_ids)
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
