"""`emoe chat` on the embedded model."""

from __future__ import annotations

import io
from typing import Any

import pytest

import emoe
from emoe.cli import main
from emoe.cli.chat import Conversation
from emoe.cli.session import Session


def chat(monkeypatch: pytest.MonkeyPatch, lines: str, *args: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", "-n", "8", *args])


@pytest.fixture
def session() -> Any:
    model, tokenizer = emoe.load(expert_memory="40%")
    with Session(model, tokenizer, "emoe-nano") as opened:
        yield opened


def test_lines_are_answered_until_the_input_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "Hello there.\n\nHow are you?\n/stats\n/help\n/nothing\n") == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) >= 2
    assert "4 messages" in printed.err
    assert "no command '/nothing'" in printed.err


def test_quit_leaves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(monkeypatch, "/quit\nHello\n") == 0
    assert capsys.readouterr().out == ""


def test_two_interrupts_at_the_prompt_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert main(["chat"]) == 130
    assert "Ctrl-C once more" in capsys.readouterr().err


def test_history_is_kept_and_forgotten(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(session, "Be brief.", {"max_new_tokens": 6})
    conversation.answer("Hello.")
    conversation.answer("Who are you?")
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    conversation._command("/reset")
    assert [message["role"] for message in conversation.messages] == ["system"]


def test_the_kept_cache_changes_nothing_but_the_work(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second turn passes only its own tokens through the model, and answers as if it had passed all."""
    lengths: list[int] = []
    session.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    turns = ("Hello there.", "What is two and three?", "Why?")
    kept = Conversation(session, None, {"max_new_tokens": 6})
    for turn in turns:
        kept.answer(turn)
    prompts_kept = [n for n in lengths if n > 1]
    lengths.clear()
    anew = Conversation(session, None, {"max_new_tokens": 6})
    for turn in turns:
        anew._forget_cache()
        anew.answer(turn)
    prompts_anew = [n for n in lengths if n > 1]
    assert kept.messages == anew.messages
    assert prompts_kept[0] == prompts_anew[0]
    assert prompts_kept[2] < prompts_anew[2] / 2


def test_the_oldest_turns_are_forgotten_aloud(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(session, None, {"max_new_tokens": 4})
    for _ in range(3):
        conversation.answer("word " * 400)
    assert "the oldest turn is forgotten" in capsys.readouterr().err
    assert len(conversation.messages) < 6
