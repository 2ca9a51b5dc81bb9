"""/v1/completions and the tokenizer's endpoints with the real engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.conftest import Running


def test_text_and_tokens_are_the_same_prompt(client: Any, tokenizer: Any) -> None:
    ids = tokenizer("The cat sat").input_ids
    made = [
        client.completions.create(model="emoe-nano", prompt=prompt, max_tokens=6, extra_body={"ignore_eos": True})
        for prompt in ("The cat sat", ids, ["The cat sat"], [ids])
    ]
    assert len({each.choices[0].text for each in made}) == 1
    assert {each.usage.prompt_tokens for each in made} == {len(ids)}
    assert made[0].object == "text_completion" and made[0].choices[0].finish_reason == "length"


def test_sixteen_tokens_by_default(client: Any) -> None:
    made = client.completions.create(model="emoe-nano", prompt="a", extra_body={"ignore_eos": True})
    assert made.usage.completion_tokens == 16


def test_several_prompts_several_choices(client: Any) -> None:
    made = client.completions.create(model="emoe-nano", prompt=["a b c", "x y"], n=2, max_tokens=3)
    alone = [client.completions.create(model="emoe-nano", prompt=each, max_tokens=3) for each in ("a b c", "x y")]
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in made.choices] == [alone[i // 2].choices[0].text for i in range(4)]
    assert made.usage.prompt_tokens == sum(each.usage.prompt_tokens for each in alone)


def test_a_stream(client: Any) -> None:
    whole = client.completions.create(model="emoe-nano", prompt="Hello there", max_tokens=8)
    chunks = list(client.completions.create(model="emoe-nano", prompt="Hello there", max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].emoe["mode"] == "exact"


def test_logprobs(client: Any) -> None:
    made = client.completions.create(
        model="emoe-nano", prompt="Hello", max_tokens=5, logprobs=2, extra_body={"ignore_eos": True}
    )
    found = made.choices[0].logprobs
    assert "".join(found.tokens) == made.choices[0].text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]
    for token, logprob, tops in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(tops) == 2 and tops[token] == logprob == max(tops.values())


def test_a_seed_repeats_and_its_absence_does_not(client: Any) -> None:
    def sample(**fields: Any) -> str:
        made = client.completions.create(
            model="emoe-nano", prompt="Hello", max_tokens=24, temperature=2, extra_body={"ignore_eos": True}, **fields
        )
        return str(made.choices[0].text)

    assert sample(seed=3) == sample(seed=3)
    assert sample(seed=-4) == sample(seed=-4)
    assert len({sample() for _ in range(4)}) > 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([4096], "4096 is no token"),
        ([], "prompt"),
        ([[1], []], "prompt"),
        ([1, "a"], "prompt"),
        ([-1], "prompt"),
        (None, "prompt"),
        (["a"] * 129, "prompt"),
        ("x" * 30000, "context"),
    ],
)
def test_prompts_that_cannot_be_meant(server: Running, prompt: Any, message: str) -> None:
    reply = server.post("/v1/completions", {"prompt": prompt})
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"].startswith("prompt")


def test_tokenize_and_detokenize_in_vllms_shapes(server: Running, tokenizer: Any) -> None:
    text = "héllo 日本 🙂"
    made = server.post("/tokenize", {"model": "emoe-nano", "prompt": text, "return_token_strs": True}).json()
    assert made["tokens"] == tokenizer(text).input_ids
    assert (made["count"], made["max_model_len"]) == (len(made["tokens"]), 1024)
    assert made["token_strs"] == tokenizer.convert_ids_to_tokens(made["tokens"])
    assert server.post("/detokenize", {"tokens": made["tokens"]}).json() == {"prompt": text}
    turns = [{"role": "user", "content": text}]
    for generation in (True, False):
        chat = server.post("/tokenize", {"messages": turns, "add_generation_prompt": generation}).json()["tokens"]
        wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=generation, return_dict=False)
        assert chat == wanted
    assert server.post("/detokenize", {"tokens": [9999]}).status_code == 400
    assert server.post("/tokenize", {}).status_code == 400
    long = server.post("/tokenize", {"prompt": "word " * 5000}).json()  # encoded by another thread
    assert long["tokens"] == tokenizer("word " * 5000).input_ids


def test_version_and_schema(server: Running) -> None:
    import emoe

    assert server.client.get("/version").json() == {"version": emoe.__version__}
    schema = server.client.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/health", "/metrics"} <= set(schema["paths"])
    assert "422" not in json.dumps(schema["paths"])
    assert server.client.get("/docs").status_code == 404
