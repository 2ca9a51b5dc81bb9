"""Text from tokens, piece by piece, against decoding the whole and `str.find`."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emoe.server.streaming import UNFINISHED, AnswerText, Detokeniser, StopStrings

BYTE_TOKENS = st.binary(min_size=1, max_size=5)


def byte_decoder(vocabulary: list[bytes]) -> Any:
    """As byte-level tokenizers decode: the bytes of all tokens together."""
    return lambda ids: b"".join(vocabulary[i] for i in ids).decode(errors="replace")


def byte_fallback_decoder(ids: list[int]) -> str:
    """As sentencepiece decodes with byte fallback: numbers below 256 are bytes, and a run of them is text or nothing.

    The others are words with a space before them, which the first of a text loses.
    """
    text, run = "", b""
    for i in [*ids, -1]:
        if 0 <= i < 256:
            run += bytes([i])
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError:
            text += UNFINISHED * len(run)
        run = b""
        text += "" if i < 0 else f" w{i}"
    return text.removeprefix(" ")


def pieces(decode: Any, ids: list[int]) -> list[str]:
    detokeniser = Detokeniser(decode)
    return [*(detokeniser.add(i) for i in ids), detokeniser.finish()]


@given(st.lists(BYTE_TOKENS, min_size=1, max_size=150))
def test_pieces_are_the_text_of_the_whole_whatever_the_bytes(vocabulary: list[bytes]) -> None:
    decode = byte_decoder(vocabulary)
    ids = list(range(len(vocabulary)))
    assert "".join(pieces(decode, ids)) == decode(ids)


@given(st.text(max_size=40), st.lists(st.integers(1, 4), min_size=1, max_size=20))
def test_no_character_is_cut(text: str, sizes: list[int]) -> None:
    raw, at = text.encode(errors="ignore"), 0
    vocabulary: list[bytes] = []
    while at < len(raw):
        size = sizes[len(vocabulary) % len(sizes)]
        vocabulary.append(raw[at : at + size])
        at += size
    made = pieces(byte_decoder(vocabulary), list(range(len(vocabulary))))
    assert "".join(made) == raw.decode()
    if UNFINISHED not in text:
        assert all(UNFINISHED not in piece for piece in made)


@given(st.lists(st.text("añ日🙂", min_size=1, max_size=4) | st.integers(300, 310), max_size=30))
def test_byte_fallback_and_words(parts: list[str | int]) -> None:
    ids: list[int] = []
    for part in parts:
        ids += part.encode() if isinstance(part, str) else [part]
    made = pieces(byte_fallback_decoder, ids)
    assert "".join(made) == byte_fallback_decoder(ids)
    assert all(UNFINISHED not in piece for piece in made)


@given(st.lists(st.integers(0, 4095), max_size=60))
def test_the_embedded_tokenizer(tokenizer: Any, ids: list[int]) -> None:
    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=True))

    assert "".join(pieces(decode, ids)) == decode(ids)


@pytest.mark.parametrize("pattern", [[b"\xff"], [b"\xe6", b"\x97"], [b"a"], [b"\xf0\x9f", b"\x99"], [b"\x80", b"a"]])
def test_the_work_is_linear_in_the_length(pattern: list[bytes]) -> None:
    decoded = 0
    decode = byte_decoder(pattern)

    def counting(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return str(decode(ids))

    work = []
    for length in (1000, 4000):
        decoded = 0
        ids = [i % len(pattern) for i in range(length)]
        assert "".join(pieces(counting, ids)) == decode(ids)
        work.append(decoded)
    assert work[1] < 5 * work[0]


def first_stop(text: str, stops: list[str]) -> int | None:
    """Where the stop string begins that is complete first; of two complete at once, the longer."""
    for end in range(1, len(text) + 1):
        found = [start for stop in stops if (start := text.find(stop, 0, end)) >= 0]
        if found:
            return min(found)
    return None


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
)
@example(["a", "b"], ["b", "ab"])
@example(["ab"], ["ab", "b"])
def test_stop_strings_cut_where_str_find_says(parts: list[str], stops: list[str]) -> None:
    text = "".join(parts)
    at = first_stop(text, stops)
    scanner, out = StopStrings(stops), ""
    for part in parts:
        before = scanner.stopped
        piece = scanner.add(part)
        assert not (before and piece)
        out += piece
        assert text.startswith(out) and (at is None or len(out) <= at)
    assert scanner.stopped is (at is not None)
    assert out + ("" if scanner.stopped else scanner.finish()) == text[:at]


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=5))
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stop: str) -> None:
    if stop in text:
        return
    scanner = StopStrings([stop])
    out = "".join(scanner.add(character) for character in text)
    longest = max(n for n in range(len(stop)) if text.endswith(stop[:n]))
    assert len(text) - len(out) == longest


@given(st.lists(st.integers(5, 4095), max_size=40), st.text(min_size=1, max_size=3), st.integers(0, 30))
def test_an_answer_is_cut_at_a_stop_string(tokenizer: Any, ids: list[int], chosen: str, at: int) -> None:
    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=True))

    whole = decode(ids)
    stop = whole[at : at + 3] or chosen
    answer, out = AnswerText(decode, [stop]), ""
    for token in ids:
        out += answer.add(token)
        if answer.stopped:
            break
    out += answer.finish()
    assert out == whole[: whole.find(stop)] if stop in whole else out == whole
    assert answer.length == len(out)


def test_tokens_know_where_they_begin(tokenizer: Any) -> None:
    ids = tokenizer("a 日本 b", add_special_tokens=False).input_ids
    answer = AnswerText(tokenizer.decode, [])
    text = "".join(answer.add(token) for token in ids)
    assert text == "a 日本 b"
    assert next(text[begin] for begin in answer.begins if begin < len(text)) == "a"
    assert list(answer.begins) == sorted(answer.begins)
    assert text[answer.begins[-1] :] == " b"
