"""Arithmetic of loads against brute force, and what is planned to be sent."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.bench.serve.client import Record, Server
from emoe.bench.serve.report import report_text
from emoe.bench.serve.results import LoadReport, Spread, Summary
from emoe.bench.serve.settings import LoadSettings
from emoe.bench.serve.stream import EventParser, read_part
from emoe.bench.serve.targets import Book, Targets, unloaded
from emoe.bench.serve.workload import Prompt, Ruler, parse_mix, plan, read_prompts
from emoe.errors import UsageError
from emoe.scheduling.arrivals import Arrival, poisson_arrivals

PROMPTS = [Prompt("what is it", "qa"), Prompt("who is it", "qa"), Prompt("2 + 2", "maths"), Prompt("def f", "code", 5)]

seconds = st.floats(0.001, 50, allow_nan=False)


@st.composite
def records(draw: st.DrawFn) -> Record:
    sent = draw(seconds)
    gaps = draw(st.lists(seconds, max_size=6))
    times = [sent + sum(gaps[: i + 1]) for i in range(len(gaps))]
    failed = draw(st.booleans()) or not times
    record = Record(
        number=0,
        task=draw(st.sampled_from(["qa", "maths"])),
        due_s=sent,
        sent_s=sent,
        first_s=times[0] if times else None,
        last_s=None if failed else times[-1],
        ended_s=(times or [sent])[-1],
        events_s=times,
        output_tokens=len(times),
        error="timeout" if failed else None,
    )
    targets = Targets(draw(st.none() | seconds), draw(st.none() | seconds))
    if record.ttft_s is not None:
        record.met = record.ok and targets.met(record.ttft_s, record.tpot_s)
    record.told = {"targets": (targets.ttft_s, targets.tpot_s)}
    return record


def quantile(values: list[float], share: float) -> float:
    """Linear interpolation between order statistics, as the definition says."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@given(st.lists(seconds, min_size=1, max_size=200))
def test_percentiles_are_what_the_definition_says(values: list[float]) -> None:
    found = Spread.of(values)
    assert found is not None
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert found.median == pytest.approx(quantile(values, 0.5))
    assert found.p99 == pytest.approx(quantile(values, 0.99))


@given(st.lists(records(), max_size=30), st.floats(0.1, 100))
def test_a_summary_is_a_count_over_the_records(found: list[Record], duration: float) -> None:
    summary = Summary.of(found, duration)
    met, tpots, gaps = 0, [], []
    for record in found:
        if record.error is not None:
            continue
        ttft, tpot = record.told["targets"] if record.told else (None, None)
        first, last = record.events_s[0], record.events_s[-1]
        mean = (last - first) / (len(record.events_s) - 1) if len(record.events_s) > 1 else None
        good = ttft is None or first - record.sent_s <= ttft
        if mean is not None:
            tpots.append(mean)
            good = good and (tpot is None or mean <= tpot)
        met += good
        gaps += [b - a for a, b in zip(record.events_s, record.events_s[1:], strict=False)]
    assert summary.met == met
    assert summary.goodput == pytest.approx(met / duration)
    assert summary.successful == sum(record.error is None for record in found)
    for name, values in (("tpot", tpots), ("itl", gaps)):
        spread = summary.spreads[name]
        assert (spread is None) == (not values)
        if spread is not None:
            assert spread.p99 == pytest.approx(quantile(values, 0.99))


def test_a_report_tells_tasks_apart() -> None:
    found = [
        Record(
            number=i, task="qa" if i % 2 else "maths", sent_s=1.0 + i, first_s=1.5 + i, last_s=2.5 + i, output_tokens=3
        )
        for i in range(4)
    ]
    for record in found:
        record.ended_s, record.met = record.sent_s + 1.5, record.task == "qa"
    found.append(Record(number=4, task="qa", sent_s=3.0, ended_s=11.0, error="timeout", message="late"))
    settings = LoadSettings(url="http://h")
    report = LoadReport(settings, Server(model="m"), Book({"qa": Targets(1.0, 0.5)}), {}, found, planned=6)
    assert report.duration_s == 10.0
    assert report.of_task("qa").goodput == 0.2
    assert report.of_task("qa").met_share == pytest.approx(2 / 3)
    assert report.summary().met_share == 0.4
    assert report.interrupted
    assert report.errors() == {"timeout": (1, "late")}
    text = report_text(report)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith(("qa", "maths", "all"))}
    assert rows["qa"][1:5] == ["3", "2", "67%", "0.200"]
    assert rows["qa"][-1] == "1000/500"
    assert rows["maths"][-1] == "-/-"
    assert "INTERRUPTED after 5 of 6" in text
    json.dumps(report.as_dict())


def test_nothing_sent_at_all() -> None:
    report = LoadReport(LoadSettings(url="http://h"), Server(model="m"), Book({}), {}, [], planned=3)
    assert "INTERRUPTED after 0 of 3" in report_text(report)
    assert report.as_dict()["all"]["goodput_per_s"] == 0


def test_unloaded_needs_are_medians() -> None:
    assert unloaded([(1.0, 0.1), (3.0, None), (2.0, 0.5)]) == Targets(2.0, 0.3)
    assert unloaded([(1.0, None)]) == Targets(1.0, None)
    book = Book({"qa": Targets(1.0), "*": Targets(2.0)})
    assert (book.of("qa"), book.of("code"), book.of(None)) == (Targets(1.0), Targets(2.0), Targets(2.0))
    assert Book({}).of("qa") == Targets()


@given(st.lists(st.text(max_size=8), min_size=1, max_size=5), st.lists(st.integers(0, 60), max_size=8))
def test_events_are_the_same_however_the_bytes_are_cut(texts: list[str], cuts: list[int]) -> None:
    lines = ["".join(c for c in text if c not in "\r\n") for text in texts]
    whole = "".join(f": comment\r\ndata: {line}\r\nid: 3\r\n\r\n" for line in lines).encode()
    places = sorted({min(cut, len(whole)) for cut in cuts})
    parser, found = EventParser(), []
    for start, stop in zip([0, *places], [*places, len(whole)], strict=True):
        found += parser.feed(whole[start:stop])
    assert found == lines


def test_events_of_several_lines_and_without_a_space() -> None:
    assert EventParser().feed(b"data:a\ndata: b\n\ndata: c\n") == ["a\nb"]


@pytest.mark.parametrize(
    ("value", "text", "finish"),
    [
        ({"choices": [{"delta": {"content": "a"}}]}, "a", None),
        (
            {"choices": [{"delta": {"content": None, "reasoning_content": "b"}, "finish_reason": "length"}]},
            "b",
            "length",
        ),
        ({"choices": [{"text": "c", "finish_reason": None}]}, "c", None),
        ({"choices": []}, "", None),
        ({}, "", None),
    ],
)
def test_parts(value: Any, text: str, finish: str | None) -> None:
    part = read_part(json.dumps(value))
    assert (part.text, part.finish, part.usage, part.error) == (text, finish, None, None)


def test_plans_have_the_mix_and_take_prompts_in_turn() -> None:
    arrivals = poisson_arrivals(10, 4000, seed=3)
    made, shortened = plan(arrivals, PROMPTS, parse_mix("qa=2,maths=1", PROMPTS), max_tokens=9, seed=1)
    assert shortened == 0
    shares = Counter(request.task for request in made)
    assert set(shares) == {"qa", "maths"}
    assert abs(shares["qa"] / 4000 - 2 / 3) < 0.04
    qa = [request.prompt for request in made if request.task == "qa"]
    assert qa[:4] == ["what is it", "who is it"] * 2
    assert all(request.label == request.task and request.max_tokens == 9 for request in made)
    assert [request.at_s for request in made] == [arrival.at_s for arrival in arrivals]
    code, _ = plan(arrivals[:3], PROMPTS, parse_mix("code", PROMPTS), max_tokens=9)
    assert [request.max_tokens for request in code] == [5, 5, 5]


def test_wrong_labels_are_nested_and_change_nothing_else() -> None:
    arrivals = poisson_arrivals(10, 2000)
    mix = parse_mix(None, PROMPTS)
    plans = [plan(arrivals, PROMPTS, mix, max_tokens=9, wrong_labels=share)[0] for share in (0.0, 0.2, 0.5, 1.0)]
    wrong = [{request.number for request in made if request.label != request.task} for made in plans]
    assert not wrong[0]
    assert wrong[1] < wrong[2] < wrong[3]
    assert len(wrong[3]) == 2000
    assert abs(len(wrong[1]) / 2000 - 0.2) < 0.04
    assert all(
        (one.task, one.prompt, one.at_s) == (other.task, other.prompt, other.at_s)
        for one, other in zip(plans[0], plans[3], strict=True)
    )
    unlabelled, _ = plan(arrivals, PROMPTS, mix, max_tokens=9, labels=False)
    assert {request.label for request in unlabelled} == {None}


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(2, 1000))
def test_fitted_requests_stay_within_the_context(tokens: int, answer: int, context: int) -> None:
    ruler = Ruler(0.0, {"qa": 1.0}, 1.0)
    (made,), shortened = plan(
        [Arrival(0.0, tokens, answer)], PROMPTS, {"qa": 1.0}, max_tokens=9, ruler=ruler, context=context
    )
    assert made.input_tokens == len(made.prompt)
    assert made.max_tokens >= 1
    if tokens + answer <= context:
        assert (made.input_tokens, made.max_tokens, shortened) == (tokens, answer, 0)
    else:
        assert shortened == 1
        assert made.input_tokens + made.max_tokens <= context


def test_a_ruler_finds_overhead_and_characters() -> None:
    ruler = Ruler.of({"qa": ((100, 12 + 20), (300, 12 + 60)), "code": ((100, 12 + 50), (200, 12 + 100))})
    assert ruler.overhead == pytest.approx(12)
    assert len(ruler.fit(Prompt("x", "qa"), 52)) == 200
    assert len(ruler.fit(Prompt("x", "code"), 52)) == 80
    assert len(ruler.fit(Prompt("x", "qa"), 1)) == 1
    assert Ruler.of({"qa": ((100, 5), (100, 5))}) == Ruler()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: no JSON"),
        ("[]", 'line 2: needs an object with a "prompt"'),
        ('{"prompt": ""}', 'line 2: needs an object with a "prompt"'),
        ('{"prompt": "a", "task": 3}', 'line 2: "task" must be a name, not 3'),
        ('{"prompt": "a", "max_tokens": 0}', 'line 2: "max_tokens" must be a whole number'),
    ],
)
def test_malformed_prompts_are_named_with_the_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "fine", "task": "qa", "max_tokens": 3}}\n{line}\n')
    with pytest.raises(UsageError, match=f"p.jsonl, {said}"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(UsageError, match="holds no prompts"):
        read_prompts(path)
    with pytest.raises(UsageError, match="cannot read prompts from"):
        read_prompts(tmp_path / "none")


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ("poetry=1", "no prompt has that task; there are code, maths, qa"),
        ("qa=x", "'x' is no weight"),
        ("qa=-1", "'-1' is no weight"),
        ("qa=0", "leaves no task"),
    ],
)
def test_impossible_mixes_are_named(mix: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_mix(mix, PROMPTS)


def test_one_task_cannot_be_taken_for_another() -> None:
    with pytest.raises(UsageError, match="needs at least two tasks"):
        plan([Arrival(0.0)], PROMPTS, {"qa": 1.0}, max_tokens=9, wrong_labels=0.5)
    with pytest.raises(UsageError, match="between 0 and 1, not 2"):
        plan([Arrival(0.0)], PROMPTS, {"qa": 1.0}, max_tokens=9, wrong_labels=2)


def test_without_a_file_the_prompts_are_those_of_emoe_nano() -> None:
    tasks = Counter(prompt.task for prompt in read_prompts())
    assert len(tasks) == 8
