"""What requests may say. A field that nobody knows, or whose effect emoe does not have, is refused by name.

Clients send many fields at the value that changes nothing; at that value they are accepted.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

CHOICES_AT_MOST = 128
STOPS_AT_MOST = 4
_TOKEN = Annotated[int, Field(ge=0, lt=1 << 31)]


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: true is not 1, but 1 is 1.0."""
    return isinstance(value, bool) is isinstance(neutral, bool) and bool(value == neutral)


class Neutral:
    """Marks a field that is accepted at these values and at null, where it changes nothing. It reads as None then."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Pydantic's check of the field."""
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """What OpenAPI says about the field."""
        return {"enum": [*self.values, None]}

    def _check(self, value: Any) -> None:
        if value is None or any(_same(value, each) for each in self.values):
            return
        send = " or ".join(json.dumps(each) for each in self.values)
        raise ValueError("not supported with this value; leave it out" + (f" or send {send}" if send else ""))


def _encodable(text: str) -> str:
    """JSON can write half of a surrogate pair; it is no character, and no tokenizer takes it."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must be valid Unicode, and has half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_encodable)]


def _printable(text: str) -> str:
    """A label comes back in a header, which cannot hold line breaks and the like."""
    if not text.isprintable():
        raise ValueError("has characters that cannot be printed, line breaks for example: leave them out")
    return text


def _wrong(field: str, text: str) -> PydanticCustomError:
    """For what several fields say together: the error of the one that is to change, and the only one that is told."""
    return PydanticCustomError("of_field", "{text}", {"field": field, "text": text})


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


Label = Annotated[
    str,
    Field(min_length=1, max_length=64, pattern=r"^\S(.*\S)?$"),
    AfterValidator(_encodable),
    AfterValidator(_printable),
]
Milliseconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_encodable)]


class Extras(_Body):
    """emoe's own settings of a request, all in one object."""

    task: Label | None = Field(default=None, description="the task's label; without one, keywords of the prompt tell")
    slo_ttft_ms: Milliseconds | None = Field(default=None, description="target for the time to the first token")
    slo_tpot_ms: Milliseconds | None = Field(default=None, description="target for the mean time of each later token")


class StreamOptions(_Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Neutral(False)] = None


class _Request(_Body):
    """Fields of both endpoints."""

    model: Text | None = Field(default=None, description="as /v1/models names it")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES_AT_MOST)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS_AT_MOST)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31, description="0 and -1: all")] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31, description="lower goes first")] = 0
    ignore_eos: bool | None = False
    metadata: dict[Text, Text] | None = Field(default=None, description="`task` labels the request's task")
    emoe: Extras | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    frequency_penalty: Annotated[Any, Neutral(0)] = None
    presence_penalty: Annotated[Any, Neutral(0)] = None
    repetition_penalty: Annotated[Any, Neutral(1)] = None
    min_p: Annotated[Any, Neutral(0)] = None
    min_tokens: Annotated[Any, Neutral(0)] = None
    stop_token_ids: Annotated[Any, Neutral([])] = None
    include_stop_str_in_output: Annotated[Any, Neutral(False)] = None
    skip_special_tokens: Annotated[Any, Neutral(True)] = None
    logit_bias: Annotated[Any, Neutral({})] = None
    service_tier: Annotated[Any, Neutral("auto", "default")] = None

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def task(self) -> str | None:
        """The label that the client gave."""
        if self.emoe is not None and self.emoe.task is not None:
            return self.emoe.task
        return (self.metadata or {}).get("task")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "it is for streams: set stream to true")
        labelled = (self.metadata or {}).get("task")
        if labelled is not None:
            if not labelled or labelled != labelled.strip() or len(labelled) > 64:
                raise _wrong("metadata.task", "must be a label of 1 to 64 characters without spaces around it")
            if not labelled.isprintable():
                raise _wrong("metadata.task", "has characters that cannot be printed: leave them out")
            if self.emoe is not None and self.emoe.task not in {None, labelled}:
                raise _wrong("metadata.task", "it and emoe.task name two tasks; give one")
        return self


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(kind := value.get("type"), str) and kind != "text":
            raise _wrong("type", f"{kind[:64]!r} is not supported: the model reads text")
        return value


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Annotated[Any, Neutral()] = None
    refusal: Annotated[Any, Neutral()] = None
    annotations: Annotated[Any, Neutral([])] = None
    audio: Annotated[Any, Neutral()] = None
    function_call: Annotated[Any, Neutral()] = None
    tool_calls: Annotated[Any, Neutral([])] = None

    @model_validator(mode="before")
    @classmethod
    def _is_of_nobody_else(cls, value: Any) -> Any:
        if isinstance(value, dict) and (role := value.get("role")) in ("tool", "function"):
            raise _wrong("role", f"{role!r} is not supported: there are no tools here")
        return value

    @property
    def text(self) -> str:
        """The content, parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def as_turn(self) -> dict[str, str]:
        """For a chat template. OpenAI's newer word for the system is the older one there."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


class ChatRequest(_Request):
    """/v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    response_format: Annotated[Any, Neutral({"type": "text"})] = None
    tools: Annotated[Any, Neutral([])] = None
    tool_choice: Annotated[Any, Neutral("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Any, Neutral([])] = None
    function_call: Annotated[Any, Neutral("none", "auto")] = None
    store: Annotated[Any, Neutral(False)] = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    audio: Annotated[Any, Neutral()] = None
    prediction: Annotated[Any, Neutral()] = None
    reasoning_effort: Annotated[Any, Neutral()] = None
    verbosity: Annotated[Any, Neutral()] = None
    web_search_options: Annotated[Any, Neutral()] = None

    @property
    def tokens_at_most(self) -> int | None:
        """The longest answer asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def tops(self) -> int | None:
        """Log-probabilities of how many likeliest tokens beside the chosen one's; None: none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise _wrong("top_logprobs", "needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _wrong("max_tokens", "is the older name of max_completion_tokens, and they differ; give one")
        return self


class CompletionRequest(_Request):
    """/v1/completions"""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=CHOICES_AT_MOST)]
        | Annotated[list[_TOKEN], Field(min_length=1)]
        | Annotated[list[Annotated[list[_TOKEN], Field(min_length=1)]], Field(min_length=1, max_length=CHOICES_AT_MOST)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    echo: Annotated[Any, Neutral(False)] = None
    best_of: Annotated[int, Field(ge=1, le=CHOICES_AT_MOST)] | None = None
    suffix: Annotated[Any, Neutral("")] = None

    @property
    def tokens_at_most(self) -> int:
        """The longest answer asked for; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.best_of not in {None, self.n or 1}:
            raise _wrong("best_of", f"{self.best_of} is not supported with n: {self.n or 1}; leave it out")
        answers = len(self.prompts) * (self.n or 1)
        if answers > CHOICES_AT_MOST:
            text = (
                f"{self.n} for each of {len(self.prompts)} prompts makes {answers} answers, more than {CHOICES_AT_MOST}"
            )
            raise _wrong("n", f"{text}; send several requests")
        return self


class TokenizeRequest(_Body):
    """/tokenize: a prompt, or a conversation."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) is (self.messages is None):
            raise _wrong("prompt", "give either this or messages")
        if self.messages is not None and self.add_special_tokens is not None:
            raise _wrong("add_special_tokens", "it is for prompts; the chat template has its own")
        return self


class DetokenizeRequest(_Body):
    """/detokenize"""

    model: Text | None = None
    tokens: list[_TOKEN]
