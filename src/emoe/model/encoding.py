"""From a prompt or a conversation to token ids, the same way everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from traceback import walk_tb
from typing import Any

from emoe.errors import UsageError


class TemplateRefusal(UsageError):
    """A chat template that refuses a conversation, or is damaged. `reason` is the template's own word."""

    def __init__(self, reason: str, name: str) -> None:
        super().__init__(
            f"the chat template of {name or 'the model'} refuses this conversation: {reason}. Mend its "
            "chat_template.jinja, or give the prompt without it (`emoe generate --raw`)."
        )
        self.reason = reason


def encode(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    raw: bool = False,
    name: str = "",
    generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a prompt or conversation, in the chat template unless `raw` or there is none.

    With `generation_prompt` it ends where an answer begins.

    Raises:
        UsageError: the model (`name`) has no tokenizer, or the prompt holds bytes that are no text.
        TemplateRefusal: the template cannot be applied.
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
    from jinja2 import TemplateError

    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt, return_dict=False)
    except TemplateError as error:
        raise TemplateRefusal(str(error).rstrip("."), name) from error
    except Exception as error:  # a template can raise whatever Python does: None has no length, 1 is no text
        if not _within_template(error):
            raise
        raise TemplateRefusal(f"{type(error).__name__}: {error}".rstrip("."), name) from error
    return list(ids)


def _within_template(error: Exception) -> bool:
    """Whether the error passed through a template's code, which jinja2 compiles under this file name."""
    return any(frame.f_code.co_filename == "<template>" for frame, _ in walk_tb(error.__traceback__))
