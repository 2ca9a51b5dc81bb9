"""What the server answers when the engine refuses, stalls, fails or dies: a named error, never silence."""

from __future__ import annotations

from tests.server.conftest import Serve
from tests.server.stand_ins import ScriptedEngine, finished, tokens


def test_an_answer(serve: Serve) -> None:
    server = serve(ScriptedEngine([*tokens(1183, 1183), finished()]))
    reply = server.chat()
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"] == " world world"
