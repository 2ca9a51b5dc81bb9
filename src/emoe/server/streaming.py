"""From tokens to text, piece by piece: characters are never cut, and nothing of a stop string gets out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

UNFINISHED = "\ufffd"
"""What decoders give for the bytes of a character that is not complete."""

_UNFINISHED_AT_MOST = 3
"""A character has at most 4 bytes, so after more tokens than this without a whole one, there is none to come."""

_WINDOW = 32
"""Tokens after which a window that never ends in a whole character is cut, so that decoding stays linear."""


class Detokeniser:
    """Text of a growing list of tokens; the pieces together are `decode` of all of them.

    Decoders look at neighbours (spaces, characters of several tokens), so a window of the latest tokens is decoded
    each time, from one end of a whole character on, and only what is new of it is given out.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that are out
        self._clean = 0  # tokens of the window up to its latest end of a whole character

    def add(self, token: int) -> str:
        """The text that this token completes, often all of its own."""
        self._window.append(token)
        text = self._decode(self._window)
        unfinished = text.endswith(UNFINISHED)
        stable = len(text) - unfinished
        if unfinished and len(self._window) - self._clean <= _UNFINISHED_AT_MOST:
            # Byte-fallback decoders mark a whole run of bytes until its last character is complete.
            mark = text.find(UNFINISHED, self._given)
            stable = min(stable, max(mark, self._given))
        piece = text[self._given : stable]
        self._given = max(self._given, stable)
        if not unfinished:
            self._drop(self._clean)
            self._clean = len(self._window)
        elif len(self._window) - self._clean > _WINDOW:
            self._cut(text)
        return piece

    def finish(self) -> str:
        """What is left: the marks of a character that never became whole."""
        text = self._decode(self._window)
        piece = text[self._given :]
        self._given = len(text)
        return piece

    def _drop(self, tokens: int) -> None:
        """Forget the oldest tokens of the window. What they said is out."""
        if tokens:
            before = len(self._decode(self._window))
            del self._window[:tokens]
            self._given -= before - len(self._decode(self._window))

    def _cut(self, text: str) -> None:
        """Bytes that never make a character: cut where the two sides decode alone to what they do together."""
        for keep in range(2 * _UNFINISHED_AT_MOST, len(self._window)):
            old = self._decode(self._window[:-keep])
            if len(old) <= self._given and old + self._decode(self._window[-keep:]) == text:
                del self._window[:-keep]
                self._given -= len(old)
                break
        self._clean = len(self._window)


class StopStrings:
    """Lets text through up to the stop string that is complete first; of two complete at once, the longer.

    What may still become one is held back. Linear: each character moves each string's automaton (Knuth, Morris and
    Pratt's) once.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._failures = [_failures(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text that can go out; after a stop none."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        start = len(self._held) - len(text)
        for end in range(start, len(self._held)):
            length = self._step(self._held[end])
            if length:
                self.stopped = True
                out, self._held = self._held[: end + 1 - length], ""
                return out
        keep = max(self._states)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def finish(self) -> str:
        """What was held back and has not become a stop string."""
        out, self._held = self._held, ""
        return out

    def _step(self, character: str) -> int:
        """Move on by one character; the length of the longest stop string that it completes, else 0."""
        longest = 0
        for i, stop in enumerate(self._stops):
            state = self._states[i]
            while state and stop[state] != character:
                state = self._failures[i][state - 1]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                longest = max(longest, state)
                state = 0
            self._states[i] = state
        return longest


def _failures(stop: str) -> list[int]:
    """For each prefix of `stop`: the length of its longest proper prefix that is its suffix too."""
    failures, length = [0] * len(stop), 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = failures[length - 1]
        if stop[i] == stop[length]:
            length += 1
        failures[i] = length
    return failures


class AnswerText:
    """One answer's text as it grows: detokenised, and cut at a stop string. `length`: characters that are out."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._detokeniser = Detokeniser(decode)
        self._stops = StopStrings(stops)
        self._raw = 0
        self._begins: list[int] = []
        self.length = 0

    @property
    def stopped(self) -> bool:
        """A stop string has come: there is no more text."""
        return self._stops.stopped

    @property
    def begins(self) -> Sequence[int]:
        """For each token, the place in the text where it begins."""
        return self._begins

    def add(self, token: int) -> str:
        """The text that can go out with this token."""
        self._begins.append(self._raw)
        piece = self._detokeniser.add(token)
        self._raw += len(piece)
        return self._out(self._stops.add(piece))

    def finish(self) -> str:
        """The rest, when there are no more tokens."""
        if self.stopped:
            return ""
        rest = self._stops.add(self._detokeniser.finish())
        return self._out(rest if self.stopped else rest + self._stops.finish())

    def _out(self, text: str) -> str:
        self.length += len(text)
        return text
