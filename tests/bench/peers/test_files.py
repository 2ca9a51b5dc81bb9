"""What is made before anything is measured: who needs which file, how it is told, and llama.cpp's routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import pytest

from emoe.bench.peers import files, routes
from emoe.bench.peers.entries import PeersSettings
from emoe.bench.peers.files import prepared
from emoe.bench.peers.routes import Agreement, planted_routes
from emoe.bench.plant.card import ROUTES
from emoe.bench.plant.shapes import PUBLISHED
from emoe.bench.plant.write import plant
from emoe.errors import UnsupportedModelError, UsageError
from emoe.routing.trace import Trace
from tests.bench.plant.made_up import made_up_trace

TOKENS = 20


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    plant(PUBLISHED["tiny-olmoe"], made_up_trace(TOKENS).write(folder / "made-up.npz"), TOKENS, folder / "x")
    return folder / "x"


class Llama:
    """In place of llama.cpp: takes the planted routes, best last, but for one."""

    asked: list[tuple[str, dict[str, Any]]]
    found: list[Any]

    def __init__(self, *started: Any) -> None:
        assert started[0] == "llama.cpp" and started[3][0] == "a-python"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, operation: str, **values: Any) -> dict[str, Any]:
        Llama.asked.append((operation, values))
        return {"routes": Llama.found[: len(values["tokens"])]} if operation == "routes" else {}


@pytest.fixture(autouse=True)
def pretended(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Llama.asked = []
    Llama.found = [[row[::-1] for row in token] for token in Trace.read(planted / ROUTES).experts.tolist()]
    monkeypatch.setattr(routes, "WorkerClient", Llama)


@pytest.mark.parametrize(("asked", "fed"), [(7, 7), (32, TOKENS)])
def test_routes_are_compared_whatever_their_order(planted: Path, asked: int, fed: int) -> None:
    layers = len(Llama.found[0])
    assert planted_routes(planted, Path("g"), Path("a-python"), asked) == Agreement(fed * layers, fed * layers)
    (load, settings), (routes_, fed_) = Llama.asked
    assert (load, routes_, fed_["tokens"]) == ("load", "routes", list(range(fed)))
    assert settings == {
        "gguf": "g", "threads": 1, "load_mode": "mmap", "repack": False, "context": fed, "record": True
    }  # fmt: skip
    Llama.found[2][1] = [97, 98]
    found = planted_routes(planted, Path("g"), Path("a-python"), asked)
    assert found.text == f"llama.cpp takes {fed * layers - 1} of {fed * layers} planted routes"
    Llama.found[0] = Llama.found[0][1:]
    with pytest.raises(ValueError, match="zip"):
        planted_routes(planted, Path("g"), Path("a-python"), asked)


def test_each_engine_has_its_own_files(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what cannot be made is told in its row."""
    said: list[str] = []

    def quantise(folder: Path, *, expert_dtype: str, progress: Any) -> Path:
        for done in (0, 5, 6, 95, 100):
            progress(done, 100)
        return Path(expert_dtype)

    def cached_gguf(folder: Path, precision: str, cache: Path, progress: Any) -> Path:
        if precision == "q4_0":
            raise UnsupportedModelError("rows do not divide")
        return Path(precision)

    def made(*peers: str, **changes: Any) -> files.Files:
        settings = PeersSettings(folder=planted, cache=planted, memory_limits=("none",), peers=peers, **changes)
        return prepared(settings, said.append)

    monkeypatch.setattr(files, "quantise", quantise)
    monkeypatch.setattr(files, "cached_gguf", cached_gguf)
    monkeypatch.setattr(files, "llama_python", lambda cache: Path("a-python"))
    dtypes = ("native", "int8", "int4")
    whole = made("emoe", "llama.cpp", expert_dtypes=dtypes, check_routes=True)
    assert whole.checkpoint == tuple(sorted(planted.glob("*.safetensors")))
    assert whole.quantised == {"int8": Path("int8"), "int4": Path("int4")} and whole.llama == Path("a-python")
    assert whole.ggufs == {"native": Path("native"), "int8": Path("q8_0"), "int4": "no GGUF: rows do not divide"}
    assert list(whole.routes) == ["native", "int8"] and all(one.equal == one.of for one in whole.routes.values())
    shown = [text.removeprefix("writing int8: ").split(" of ")[0] for text in said if "writing int8" in text]
    assert shown == ["0%", "95%", "100%"], "each tenth once"
    assert "int8: llama.cpp takes 60 of 60 planted routes" in said
    alone = made("transformers", expert_dtypes=dtypes)
    assert not alone.quantised and alone.llama is None and set(alone.ggufs.values()) == {"GGUF"} and not alone.routes
    with pytest.raises(UsageError, match="it needs both"):
        made("emoe", check_routes=True)
