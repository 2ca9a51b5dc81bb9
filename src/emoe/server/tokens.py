"""The tokenizer as the server uses it: prompts in, text and single tokens out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from emoe.errors import UsageError
from emoe.model.encoding import TemplateRefusal, encode
from emoe.server.errors import ApiError
from emoe.server.schemas import Message

_ASIDE_CHARACTERS = 4096
"""A longer text is encoded by another thread, so that streams go on meanwhile (1 MiB takes about a second)."""

LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON has no number for; OpenAI's servers say the same."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Tokens:
    """Encodes and decodes. One thread encodes at a time; decoding needs none.

    Raises:
        UsageError: there is no tokenizer, so nothing could be served.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if tokenizer is None:
            raise UsageError(f"{name} has no tokenizer, so it cannot be served; add its tokenizer files to its folder")
        self._tokenizer = tokenizer
        self._name = name
        self._aside = ThreadPoolExecutor(1, "emoe-tokenizer")
        self.size = len(tokenizer)

    def close(self) -> None:
        """End the thread."""
        self._aside.shutdown(wait=False, cancel_futures=True)

    async def chat(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[int]:
        """A conversation in the model's chat template.

        Raises:
            ApiError: there is no template, or it refuses the conversation.
        """
        if self._tokenizer.chat_template is None:
            raise ApiError(
                400,
                f"{self._name} has no chat template; use /v1/completions, or add chat_template.jinja to its folder",
                param="messages",
                code="chat_template_missing",
            )
        turns = [message.as_turn() for message in messages]

        def template() -> list[int]:
            return encode(self._tokenizer, turns, name=self._name, generation_prompt=generation_prompt)

        try:
            return await self._run(template, sum(len(turn["content"]) for turn in turns))
        except TemplateRefusal as error:
            message = f"the model's chat template refuses these messages: {error.reason}"
            raise ApiError(400, message, param="messages", code="chat_template_refused") from error

    async def text(self, prompt: str, *, special: bool = True) -> list[int]:
        """A text as it is, with what the tokenizer puts around every text where `special`."""
        return await self._run(lambda: list(self._tokenizer(prompt, add_special_tokens=special).input_ids), len(prompt))

    async def _run(self, encode_it: Any, characters: int) -> list[int]:
        if characters <= _ASIDE_CHARACTERS:
            ids: list[int] = encode_it()
            return ids
        return await asyncio.get_running_loop().run_in_executor(self._aside, encode_it)

    def check(self, ids: Sequence[int], param: str) -> None:
        """Refuse numbers that are no tokens."""
        wrong = next((token for token in ids if token >= self.size), None)
        if wrong is not None:
            message = f"{param}: {wrong} is no token; {self._name} has {self.size}, from 0 on"
            raise ApiError(400, message, param=param, code="invalid_value")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer: without special tokens, spaces as they are."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text with special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def strings(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's entries."""
        return list(self._tokenizer.convert_ids_to_tokens(list(ids)))

    def one(self, token: int) -> tuple[str, list[int]]:
        """A token's text and bytes; where the bytes are no whole character, the text is like OpenAI's `bytes:\\xe6`."""
        text = self.decode_all([token])
        if "\ufffd" not in text:
            return text, list(text.encode())
        entry = self.strings([token])[0]
        raw = bytes([int(match[1], 16)]) if (match := _BYTE_TOKEN.fullmatch(entry)) else self._raw(entry)
        if raw is None:
            return text, list(text.encode())
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)

    @staticmethod
    def logprob(value: float | None) -> float:
        """A log-probability as JSON can say it."""
        return LEAST_LOGPROB if value is None else max(value, LEAST_LOGPROB)

    def _raw(self, entry: str) -> bytes | None:
        """The bytes behind an entry of a byte-level vocabulary."""
        if any(character not in self._bytes_of for character in entry):
            return None
        return bytes(self._bytes_of[character] for character in entry)

    @cached_property
    def _bytes_of(self) -> dict[str, int]:
        """Byte-level vocabularies write each byte as a printable character (GPT-2's table)."""
        own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in set(own)]
        return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}
