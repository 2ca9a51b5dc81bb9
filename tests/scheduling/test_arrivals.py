"""Arrivals from files and drawn ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emoe.errors import UsageError
from emoe.scheduling.arrivals import Arrival, poisson_arrivals, read_arrivals

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROWS = (
    "2023-11-16 18:15:46.6805900,374,44\n",
    "2023-11-16 18:15:50.6805900,396,109\n",
    "2023-11-16 18:16:46.6805900,879,0\n",
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "arrivals.csv"
    path.write_text(HEAD + "".join(ROWS))
    return path


def test_times_count_from_the_first_row(file: Path) -> None:
    assert read_arrivals(file) == [Arrival(0.0, 374, 44), Arrival(4.0, 396, 109), Arrival(60.0, 879, 1)]


def test_times_and_lengths_are_scaled(file: Path) -> None:
    found = read_arrivals(file, time_scale=0.5, length_scale=0.1)
    assert found == [Arrival(0.0, 37, 4), Arrival(2.0, 40, 11), Arrival(30.0, 88, 1)]


def test_some_of_the_rows(file: Path) -> None:
    assert read_arrivals(file, start=1, limit=1) == [Arrival(0.0, 396, 109)]
    assert read_arrivals(file, limit=2) == read_arrivals(file)[:2]
    assert read_arrivals(file, start=2) == [Arrival(0.0, 879, 1)]


def test_requests_may_come_at_once(file: Path) -> None:
    file.write_text(HEAD + ROWS[0] + ROWS[0])
    assert [each.at_s for each in read_arrivals(file)] == [0.0, 0.0]


def test_columns_are_found_by_name_and_empty_lines_skipped(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("Model,GeneratedTokens,TIMESTAMP,ContextTokens\nx,7,2024-05-10 00:00:00.009930+00:00,99\n\n")
    assert read_arrivals(path) == [Arrival(0.0, 99, 7)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n", r"arrivals.csv, line 1: no column TIMESTAMP"),
        ("", r"arrivals.csv, line 1: no column TIMESTAMP"),
        (HEAD, r"arrivals.csv has no arrivals from row 0 on"),
        (HEAD + ROWS[0] + "yesterday,1,2\n", r"arrivals.csv, line 3: TIMESTAMP 'yesterday' is no time"),
        (HEAD + ROWS[0] + "2023-11-16 18:15:51,12.5,2\n", r"line 3: ContextTokens '12.5' is no whole number"),
        (HEAD + ROWS[0] + "2023-11-16 18:15:51,12\n", r"line 3: GeneratedTokens '' is no whole number"),
        (HEAD + ROWS[0] + "2023-11-16 18:15:51,12,-2\n", r"line 3: GeneratedTokens '-2' is no whole number"),
        (HEAD + ROWS[1] + ROWS[0], r"line 3: 2023-11-16 18:15:46.680590 is before the row above it; sort"),
    ],
)
def test_malformed_files_are_named_with_the_line(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_arrivals(file)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read arrivals from .*none.csv"):
        read_arrivals(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"cannot read arrivals from .*binary.csv"):
        read_arrivals(tmp_path / "binary.csv")


def test_impossible_numbers(file: Path) -> None:
    with pytest.raises(UsageError, match="time scale must be above 0, not 0"):
        read_arrivals(file, time_scale=0)
    with pytest.raises(UsageError, match="length scale must be above 0, not nan"):
        read_arrivals(file, length_scale=float("nan"))
    with pytest.raises(UsageError, match="not start 0, limit 0"):
        read_arrivals(file, limit=0)
    with pytest.raises(UsageError, match="not start -1, limit None"):
        read_arrivals(file, start=-1)
    with pytest.raises(UsageError, match="time scale must be above 0, not inf"):
        read_arrivals(file, time_scale=float("inf"))
    with pytest.raises(UsageError, match="no arrivals from row 3 on"):
        read_arrivals(file, start=3)
    with pytest.raises(UsageError, match="rate must be above 0"):
        poisson_arrivals(0, 5)
    with pytest.raises(UsageError, match="rate must be above 0"):
        poisson_arrivals(float("inf"), 5)
    with pytest.raises(UsageError, match="at least 1 request, not 0"):
        poisson_arrivals(1, 0)


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    times = np.array([arrival.at_s for arrival in poisson_arrivals(4.0, 20_001, seed=1)])
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.min() >= 0
    # Exponential: mean and standard deviation both 1/rate; 5 standard errors of 20,000 draws.
    assert abs(gaps.mean() - 0.25) < 5 * 0.25 / 20_000**0.5
    assert abs(gaps.std() - 0.25) < 0.02
    assert [len(poisson_arrivals(4.0, count)) for count in (1, 2, 7)] == [1, 2, 7]
    assert poisson_arrivals(4.0, 50, seed=1) == poisson_arrivals(4.0, 50, seed=1)
    assert poisson_arrivals(4.0, 50, seed=1) != poisson_arrivals(4.0, 50, seed=2)
