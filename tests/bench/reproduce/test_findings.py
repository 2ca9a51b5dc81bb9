"""What experiments leave in their folder, and the page made of it."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.experiment import NAMES, chosen, experiment
from emoe.bench.reproduce.findings import (
    MEANINGS,
    VERDICTS,
    Claim,
    Finding,
    Picture,
    Table,
    read_finding,
    write_finding,
)
from emoe.bench.reproduce.page import write_page
from emoe.errors import UsageError

CLAIM = Claim("a <claim>", "40x", "3 & 4", "partly", "because")


def picture() -> Any:
    figure, axes = drawing.panels(2)
    drawing.lines(axes[0][0], {"a": [(1, 2), (2, 3)], "b": []}, "x, s", "y", spread={"a": [(1, 3), (2, 4)]})
    drawing.paper_line(axes[0][0], 2.5, "paper 2.5")
    drawing.bars(axes[0][1], ["one", "a longer name"], {"a": [1.0, None], "b": [2.0, 3.0]}, "y")
    drawing.legend(axes[0][1])
    return figure


def finding() -> Finding:
    table = Table("rows", "Some rows", ("way", "seconds"), (("a, b", 1.25), (None, 3)))
    return Finding((CLAIM,), (table,), (Picture("curve", 'A "curve"', picture),), ("Mind this.",))


def test_a_finding_reads_back_as_written(tmp_path: Path) -> None:
    kept = write_finding(tmp_path / "fig4", "fig4", finding(), {"model": "m", "run": "x"})
    assert read_finding(tmp_path / "fig4") == kept
    rows = list(csv.reader((tmp_path / "fig4/rows.csv").read_text().splitlines()))
    assert rows == [["way", "seconds"], ["a, b", "1.25"], ["", "3"]]
    assert (tmp_path / "fig4/curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "fig4/curve.svg").read_text()


def test_pictures_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    drawing.save(picture(), tmp_path / "one")
    first = [(tmp_path / f"one.{kind}").read_bytes() for kind in ("png", "svg")]
    drawing.save(picture(), tmp_path / "one")
    assert [(tmp_path / f"one.{kind}").read_bytes() for kind in ("png", "svg")] == first


def test_what_is_not_done_reads_as_none_and_what_is_damaged_is_refused(tmp_path: Path) -> None:
    assert read_finding(tmp_path) is None
    (tmp_path / "finding.json").write_text(json.dumps({"name": "fig4"}))
    with pytest.raises(UsageError, match=r"finding\.json is damaged"):
        read_finding(tmp_path)


def test_a_verdict_needs_its_reason() -> None:
    with pytest.raises(ValueError, match="say why"):
        Claim("c", "1", "2", "does not hold")
    with pytest.raises(ValueError, match="no verdict"):
        Claim("c", "1", "2", "maybe")  # type: ignore[arg-type]


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    write_finding(tmp_path / "fig4", "fig4", finding(), {"model": "m<1>"})
    path = write_page(tmp_path)
    text = path.read_text()
    links = Links()
    links.feed(text)
    assert links.open == []
    assert len(links.found) == 4
    for link in links.found:
        assert f'id="{link[1:]}"' in text if link.startswith("#") else (tmp_path / link).is_file()
    assert all(f"{each}</dt><dd>{MEANINGS[each]}" in text for each in VERDICTS), "the legend"
    assert "a &lt;claim&gt;" in text and "m&lt;1&gt;" in text and "because" in text


def test_every_experiment_says_what_it_is() -> None:
    for name in NAMES:
        what = experiment(name)
        assert what.name == name
        assert what.title and what.question.endswith("?") and what.method.endswith(".") and what.expected.endswith(".")
        assert 0 < what.minutes[0] <= what.minutes[1]


def test_names_are_chosen_once_in_the_papers_order() -> None:
    assert [each.name for each in chosen(["all", "fig4"])] == list(NAMES)
    with pytest.raises(UsageError, match="no experiment is called 'fig99'"):
        chosen(["fig4", "fig99"])
