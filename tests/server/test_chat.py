"""/v1/chat/completions with the real engine, over a socket, mostly by the official client."""

from __future__ import annotations

import json
import math
import socket
from typing import Any

import openai
import pytest

from emoe import nano
from emoe.tasks.labels import TASKS_AT_MOST, TaskLabels
from tests.server.conftest import Running, raw_post, until

PROMPT = next(each["prompt"] for each in nano.prompts() if each["task"] == "summarise")
MESSAGES = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def answer(client: Any) -> Any:
    """The greedy answer to PROMPT."""
    return client.chat.completions.create(model="emoe-nano", messages=MESSAGES, max_tokens=60)


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, without its end, which must be there."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_an_answer(answer: Any) -> None:
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "stop")
    assert len(choice.message.content) > 20
    used = answer.usage
    assert used.total_tokens == used.prompt_tokens + used.completion_tokens
    assert used.completion_tokens < 60


def test_it_is_the_text_of_generate(answer: Any, nano_engine: Any, tokenizer: Any) -> None:
    import emoe

    model, _ = emoe.load(expert_memory="40%")
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    made = model.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :]
    emoe.close(model)
    assert answer.choices[0].message.content == tokenizer.decode(made, skip_special_tokens=True)
    assert answer.usage.prompt_tokens == ids.shape[1]
    assert answer.usage.completion_tokens == len(made)


def test_a_stream_says_the_same(client: Any, answer: Any) -> None:
    stream = client.chat.completions.create(
        model="emoe-nano", messages=MESSAGES, max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    *body, last, closing = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == answer.choices[0].message.content
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in body)
    assert last.choices[0].finish_reason == "stop"
    assert closing.choices == [] and closing.usage == answer.usage


def test_without_include_usage_a_stream_has_none(server: Running) -> None:
    assert not any("usage" in event for event in events(server.chat(max_tokens=3, stream=True).text))


def test_every_reply_says_what_it_took(server: Running) -> None:
    whole = server.chat(PROMPT, max_tokens=5)
    streamed = server.chat(PROMPT, max_tokens=5, stream=True)
    for said in (whole.json()["emoe"], events(streamed.text)[-1]["emoe"]):
        assert (said["task"], said["task_source"]) == ("summarise", "keywords")
        assert (said["mode"], said["lossy"]) == ("exact", False)
        assert 0 <= said["queue_ms"] <= said["ttft_ms"] <= said["e2e_ms"]
        assert said["slo_met"] is None and said["hits"] > 0
    assert whole.headers["x-emoe-task"] == "summarise"
    assert float(whole.headers["x-emoe-queue-ms"]) == whole.json()["emoe"]["queue_ms"]
    for reply in (whole, streamed):
        assert (reply.headers["x-emoe-mode"], reply.headers["x-emoe-lossy"]) == ("exact", "false")
        assert reply.headers["x-request-id"].startswith("chatcmpl-")
    assert streamed.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    ("fields", "headers", "ttft", "tpot", "met"),
    [
        ({}, {}, None, None, None),
        ({"emoe": {"slo_ttft_ms": 60000}}, {}, 60000, None, True),
        ({"emoe": {"slo_ttft_ms": 60000, "slo_tpot_ms": 0.0001}}, {}, 60000, 0.0, False),
        ({"emoe": {"slo_ttft_ms": 60000}}, {"x-slo-ttft-ms": "0.001"}, 0.001, None, False),
        ({}, {"x-slo-ttft-ms": "70000", "x-slo-tpot-ms": "70000"}, 70000, 70000, True),
        ({"metadata": {"task": "code"}}, {}, 100000, 100000, True),
        ({"metadata": {"task": "code"}}, {"x-slo-tpot-ms": "5e4"}, 100000, 50000, True),
        ({"emoe": {"task": "code", "slo_ttft_ms": 1}}, {"x-slo-ttft-ms": "90000"}, 90000, 100000, True),
    ],
)
def test_targets_header_before_body_before_default(
    server: Running, fields: dict[str, Any], headers: dict[str, str], ttft: Any, tpot: Any, met: Any
) -> None:
    said = server.client.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "ignore_eos": True, **fields},
        headers=headers,
    ).json()["emoe"]
    assert (said["slo_ttft_ms"], said["slo_tpot_ms"], said["slo_met"]) == (ttft, tpot, met)


def test_a_label_goes_before_keywords(server: Running) -> None:
    for fields in ({"metadata": {"task": "maths", "other": "x"}}, {"emoe": {"task": "maths"}}):
        reply = server.chat(PROMPT, max_tokens=1, **fields)
        assert (reply.json()["emoe"]["task"], reply.json()["emoe"]["task_source"]) == ("maths", "label")
    streamed = server.chat(PROMPT, max_tokens=1, stream=True, metadata={"task": "mäths"})
    assert streamed.headers["x-emoe-task"] == "m\\xe4ths"


def test_a_label_too_many_is_another_in_headers_too(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service.engine, "labels", TaskLabels(map(str, range(TASKS_AT_MOST))))
    for stream in (False, True):
        reply = server.chat(PROMPT, max_tokens=1, stream=stream, metadata={"task": "one too many"})
        assert reply.headers["x-emoe-task"] == "other" and '"task":"other"' in reply.text


def test_several_choices(client: Any) -> None:
    # Sampled texts can depend on what else is in the batch, by the numbers' last bits: greedy ones are compared.
    fields = {"model": "emoe-nano", "messages": MESSAGES, "n": 3, "max_tokens": 12}
    made = client.chat.completions.create(**fields, temperature=0)
    texts = [choice.message.content for choice in made.choices]
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert len(set(texts)) == 1
    assert len(made.emoe["choices"]) == 3
    streamed = ["", "", ""]
    reasons = []
    for chunk in client.chat.completions.create(**fields, temperature=0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    assert streamed == texts and reasons == ["length"] * 3
    one = client.chat.completions.create(model="emoe-nano", messages=MESSAGES, max_tokens=12)
    assert one.usage.prompt_tokens == made.usage.prompt_tokens
    assert made.usage.completion_tokens == 36
    seeded = client.chat.completions.create(**fields, temperature=1.5, seed=7)
    assert len({choice.message.content for choice in seeded.choices}) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_stop_strings(server: Running, answer: Any, stream: bool, as_list: bool) -> None:
    whole = answer.choices[0].message.content
    stop = whole[9:15]
    reply = server.chat(PROMPT, max_tokens=60, stop=["\x00", stop] if as_list else stop, stream=stream)
    if stream:
        found = events(reply.text)
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in found)
        reason = found[-1]["choices"][0]["finish_reason"]
    else:
        text, reason = (reply.json()["choices"][0][key] for key in ("message", "finish_reason"))
        text = text["content"]
    assert text == whole[: whole.find(stop)]
    assert reason == "stop"


def test_length_is_a_reason_too_and_has_two_names(server: Running, answer: Any) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        made = server.chat(PROMPT, **{name: 4}).json()
        assert made["choices"][0]["finish_reason"] == "length"
        assert made["usage"]["completion_tokens"] == 4
        assert answer.choices[0].message.content.startswith(made["choices"][0]["message"]["content"])


def test_logprobs(client: Any) -> None:
    made = client.chat.completions.create(
        model="emoe-nano", messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=3
    )
    found = made.choices[0].logprobs.content
    assert "".join(entry.token for entry in found) == made.choices[0].message.content
    for entry in found:
        assert len(entry.top_logprobs) == 3
        assert entry.token == entry.top_logprobs[0].token and entry.logprob == entry.top_logprobs[0].logprob
        assert bytes(entry.bytes).decode() == entry.token
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == sorted(tops, reverse=True) and sum(map(math.exp, tops)) <= 1.0001
    bare = client.chat.completions.create(model="emoe-nano", messages=MESSAGES, max_tokens=2, logprobs=True)
    assert [len(entry.top_logprobs) for entry in bare.choices[0].logprobs.content] == [0, 0]


def test_logprobs_of_a_stream_are_those_of_the_whole(server: Running, answer: Any) -> None:
    text = answer.choices[0].message.content
    stop = text[12:18]
    fields = {"max_tokens": 20, "logprobs": True, "top_logprobs": 1, "stop": stop}
    whole = server.chat(PROMPT, **fields).json()["choices"][0]["logprobs"]["content"]
    streamed = [
        entry
        for event in events(server.chat(PROMPT, stream=True, **fields).text)
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in whole]
    # The last token may begin before the stop string and end in it; none begins in it.
    said = "".join(entry["token"] for entry in whole[:-1])
    assert len(said) < text.find(stop) <= len(said + whole[-1]["token"])


def test_parts_and_developer_messages(server: Running) -> None:
    plain = server.chat("ab", max_tokens=1, messages=[{"role": "system", "content": "x"}, *MESSAGES])
    parts = [{"type": "text", "text": PROMPT[:5]}, {"type": "text", "text": PROMPT[5:]}]
    other = server.chat(
        max_tokens=1, messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    )
    assert plain.status_code == other.status_code == 200
    assert plain.json()["usage"] == other.json()["usage"]
    assert plain.json()["choices"] == other.json()["choices"]


def test_an_answer_can_be_sent_back(client: Any, answer: Any) -> None:
    history = [*MESSAGES, answer.choices[0].message, {"role": "user", "content": "And?"}]
    made = client.chat.completions.create(model="emoe-nano", messages=history, max_tokens=2)
    assert made.usage.prompt_tokens > answer.usage.total_tokens


def test_the_clients_exceptions(client: Any, server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        client.chat.completions.create(model="emoe-nano", messages=MESSAGES, temperature=9)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "invalid_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError, match="1024") as long:
        client.chat.completions.create(model="emoe-nano", messages=MESSAGES, max_tokens=5000)
    assert (long.value.param, long.value.code) == ("messages", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError, match="shorten"):
        client.chat.completions.create(model="emoe-nano", messages=[{"role": "user", "content": "word " * 2000}])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_place(server: Running, nano_engine: Any, stream: bool) -> None:
    body = {"messages": MESSAGES, "ignore_eos": True, "max_tokens": 800, "stream": stream, "n": 2}
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(raw_post("/v1/chat/completions", body))
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
        assert until(lambda: nano_engine.stats().running == 2)
        before = nano_engine.stats().generation_tokens
    assert until(lambda: nano_engine.stats().running == 0)
    stats = nano_engine.stats()
    assert stats.kv_tokens_used == 0 and stats.waiting == 0
    assert stats.generation_tokens - before < 1500


def test_models(client: Any) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == ["emoe-nano"]
    card = client.models.retrieve("emoe-nano").emoe
    assert (card["mode"], card["lossy"], card["context"], card["kv_tokens"]) == ("exact", False, 1024, 4096)
    assert card["expert_budget_bytes"] > 0
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
