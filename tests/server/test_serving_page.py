"""docs/serving.md is run: its examples, its settings file, its table of metrics."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from emoe.cli import main
from tests.server.conftest import Running

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def block(language: str) -> str:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return found[0]


def test_the_python_example_runs(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    code = block("python")
    assert "http://127.0.0.1:8000/v1" in code
    exec(compile(code.replace("http://127.0.0.1:8000", server.url), "docs/serving.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = block("toml")
    assert tomllib.loads(text)["model"] == "path-or-hub-id"
    own = text.replace('"path-or-hub-id"', '"missing"').replace('"8GiB"', '"40%"').replace('"2GiB"', '"20MiB"')
    Path("emoe.toml").write_text(own.replace('model = "missing"\n', ""))
    assert main(["serve", "--config", "emoe.toml", "--dry-run"]) == 0


def test_every_metric_is_in_the_table(server: Running) -> None:
    table = PAGE.partition("## Metrics")[2]
    shown = {name.removesuffix("_total") for name in re.findall(r"`(emoe:\w+)`", table)}
    text = server.client.get("/metrics").text
    assert {family.name.removesuffix("_total") for family in text_string_to_metric_families(text)} == shown


def test_every_reported_field_is_named(server: Running) -> None:
    said = PAGE.partition("Each reply says what it took")[2]
    fields = server.chat(max_tokens=2).json()["emoe"]
    assert not [name for name in fields if not re.search(rf"\b{name}\b", said)]
