"""A file of prompts: what is wrong is named by its line, before anything long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emoe.errors import UsageError
from emoe.profiling.prompts import digest, encode_all, first_of_each, read_prompts, tasks_of

GOOD = '{"task": "maths", "prompt": "2 + 2?"}'


def write(folder: Path, *lines: str) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(lines))
    return file


def test_prompts_and_conversations(tmp_path: Path) -> None:
    talk = {"task": "chat", "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "Hi."}]}
    prompts = read_prompts(write(tmp_path, GOOD, "", json.dumps(talk | {"reference": "Hello."})))
    assert [(p.line, p.task, p.text, p.reference) for p in prompts] == [
        (1, "maths", "2 + 2?", None),
        (3, "chat", "Hi.", "Hello."),
    ]
    assert prompts[0].messages == ({"role": "user", "content": "2 + 2?"},)
    assert tasks_of(prompts) == ("maths", "chat")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .* is not JSON"),
        ("[1]", "line 2 of .* is not an object"),
        ('{"prompt": "x"}', "line 2 of .* has no task"),
        ('{"task": " ", "prompt": "x"}', "line 2 of .* has no task"),
        ('{"task": 3, "prompt": "x"}', "line 2 of .* has no task"),
        ('{"task": "other", "prompt": "x"}', "line 2 of .* has the task 'other'"),
        ('{"task": "a"}', "line 2 of .* needs a prompt or messages"),
        ('{"task": "a", "prompt": "x", "messages": []}', "line 2 of .* needs a prompt or messages, one of them"),
        ('{"task": "a", "prompt": ""}', "line 2 of .* has an empty prompt"),
        ('{"task": "a", "messages": []}', "line 2 of .* has messages that are not a list"),
        ('{"task": "a", "messages": [{"role": "user"}]}', "line 2 of .* has messages that are not a list"),
        ('{"task": "a", "prompt": "x", "reference": 4}', "line 2 of .* has a reference that is no text"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_prompts(write(tmp_path, GOOD, line, GOOD))


def test_no_file_and_an_empty_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.jsonl cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="holds no prompts"):
        read_prompts(write(tmp_path, "", " "))


def test_the_first_of_each_task(tmp_path: Path) -> None:
    lines = [json.dumps({"task": task, "prompt": "x"}) for task in "aabbab"]
    prompts = read_prompts(write(tmp_path, *lines))
    assert first_of_each(prompts, 1) == [0, 2]
    assert first_of_each(prompts, 2) == [0, 1, 2, 3]
    assert first_of_each(prompts, 9) == [0, 1, 2, 3, 4, 5]


def test_prompts_too_long_for_the_model_are_named_by_their_line(prompt_file: Path, loaded: Any) -> None:
    _, tokenizer = loaded
    prompts = read_prompts(prompt_file)
    ids = encode_all(prompts, tokenizer, "tiny", 20, 10)
    assert [len(each) for each in ids[:2]] == [5, 6]
    with pytest.raises(UsageError, match="line 5 has 6 tokens, and tiny was made for 15"):
        encode_all(prompts[4:], tokenizer, "tiny", 15, 10)
    with pytest.raises(UsageError, match="tiny has no tokenizer"):
        encode_all(prompts, None, "tiny", None, 10)


def test_the_digest_follows_what_is_asked_not_where(tmp_path: Path) -> None:
    one = digest(read_prompts(write(tmp_path, GOOD)))
    assert digest(read_prompts(write(tmp_path, "", GOOD))) == one
    assert digest(read_prompts(write(tmp_path, GOOD.replace("2 + 2", "2 + 3")))) != one
