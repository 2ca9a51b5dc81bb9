"""`emoe bench serve` against a server whose delays are known."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from emoe.bench.serve.client import Asking, Client, Record, ServerUnusableError, base_url
from emoe.bench.serve.commands import add_serve, load_settings
from emoe.bench.serve.load import send
from emoe.bench.serve.report import report_text
from emoe.bench.serve.results import LoadReport
from emoe.bench.serve.run import run
from emoe.bench.serve.settings import LoadSettings
from emoe.bench.serve.targets import Book, Targets
from emoe.bench.serve.workload import Planned
from emoe.errors import UsageError
from tests.bench.scripted_server import Answer, Script, ScriptedServer

SLACK_S = 0.25  # this machine may be busy; the delays that are told apart are longer


def planned(number: int = 0, at_s: float = 0.0, **values: Any) -> Planned:
    usual = {"task": "qa", "label": "qa", "prompt": "why?", "max_tokens": 9}
    return Planned(number=number, at_s=at_s, **{**usual, **values})


def ask(server: ScriptedServer, *, targets: Targets | None = None, model: str | None = None, **asking: Any) -> Record:
    async def go() -> Record:
        async with Client(server.url, Asking(**asking)) as client:
            await client.look(model)
            return await client.ask(planned(), targets or Targets())

    return asyncio.run(go())


def always(answer: Answer) -> Script:
    return lambda body, headers: answer


def settings_of(*words: str) -> LoadSettings:
    parser = argparse.ArgumentParser()
    add_serve(parser)
    return load_settings(parser.parse_args(words))


def run_quietly(settings: LoadSettings) -> LoadReport:
    return asyncio.run(run(settings, lambda text: None))


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_times_are_those_of_the_stream(endpoint: Any) -> None:
    with ScriptedServer(always(Answer(first_s=0.3, gap_s=0.2, comment=True))) as server:
        record = ask(server, endpoint=endpoint)
    assert record.ok, record.message
    assert record.text == "abc"
    assert (record.input_tokens, record.output_tokens, record.counted) == (7, 3, True)
    assert record.finish == "stop"
    for found, said in ((record.ttft_s, 0.3), (record.tpot_s, 0.2), (record.e2e_s, 0.7)):
        assert found is not None
        assert said - 0.01 <= found <= said + SLACK_S
    assert len(record.itl_s) == 2


def test_without_usage_pieces_are_counted() -> None:
    with ScriptedServer(always(Answer(pieces=("a", "b"), usage=None))) as server:
        record = ask(server)
    assert (record.input_tokens, record.output_tokens, record.counted) == (None, 2, False)


def test_an_answer_without_text_begins_with_its_end() -> None:
    with ScriptedServer(always(Answer(pieces=(), usage=(7, 1), first_s=0.3))) as server:
        record = ask(server, targets=Targets(0.2, 0.001))
    assert record.ok
    assert record.tpot_s is None
    assert record.ttft_s is not None
    assert record.ttft_s >= 0.29
    assert not record.met


@pytest.mark.parametrize(
    ("answer", "name", "text"),
    [
        (
            Answer(
                status=429, body=b'{"error": {"message": "full", "type": "rate_limit_error", "code": "queue_full"}}'
            ),
            "rejected, 429 queue_full",
            "full",
        ),
        (Answer(status=500, body=b"oops"), "500 Said", "oops"),
        (Answer(status=422, body=b'{"detail": "Unexpected fields"}'), "422 Said", "Unexpected fields"),
        (Answer(end="error"), "stream read_error", "the store broke"),
        (Answer(end="nonsense"), "malformed stream", "Expecting property name"),
        (Answer(end="cut"), "connection lost", "RemoteProtocolError"),
    ],
)
def test_failures_have_names_and_are_not_sent_again(answer: Answer, name: str, text: str) -> None:
    with ScriptedServer(always(answer)) as server:
        record = ask(server, targets=Targets(10.0, 10.0))
        assert len(server.seen) == 1
    assert record.error == name
    assert text in record.message
    assert not record.met


def test_a_slow_server_times_out() -> None:
    with ScriptedServer(always(Answer(first_s=5.0))) as server:
        record = ask(server, timeout_s=0.2)
    assert record.error == "timeout"
    assert "0.2 s" in record.message


def test_others_are_told_nothing_of_emoe() -> None:
    with ScriptedServer(always(Answer())) as server:
        ask(server, targets=Targets(0.5, 0.05), ignore_eos=True)
        body, headers = server.seen[0]
    assert set(body) == {"model", "messages", "max_tokens", "temperature", "stream", "stream_options", "ignore_eos"}
    assert not [name for name in headers if name.startswith("x-")]


def test_an_emoe_server_is_told_targets_and_tasks() -> None:
    told = {"emoe": {"queue_ms": 1.5}}
    card = {"id": "m", "owned_by": "emoe", "emoe": {"context": 500}}
    with ScriptedServer(always(Answer(extra=told)), card) as server:
        record = ask(server, targets=Targets(0.5, 0.05), endpoint="completions")
        body, headers = server.seen[0]
    assert body["metadata"] == {"task": "qa"}
    assert (headers["x-slo-ttft-ms"], headers["x-slo-tpot-ms"]) == ("500.000", "50.000")
    assert record.told == {"queue_ms": 1.5}


def test_nobody_there() -> None:
    with pytest.raises(ServerUnusableError, match=r"no server answers at http://127.0.0.1:9"):
        run_quietly(settings_of("http://127.0.0.1:9/v1"))
    with pytest.raises(UsageError, match="'localhost:80' is no address"):
        base_url("localhost:80")


def test_a_server_that_cannot_list_its_models_needs_one_named() -> None:
    with ScriptedServer(always(Answer()), card={}) as server:
        assert ask(server, model="m").ok
        assert server.seen[0][0]["model"] == "m"
        with pytest.raises(ServerUnusableError, match=r"/v1/models answers 500 .*Internal Server Error"):
            ask(server)


def test_requests_are_sent_on_time_however_slow_the_answers_are() -> None:
    requests = [planned(number, number * 0.05) for number in range(10)]
    with ScriptedServer(always(Answer(first_s=0.8))) as server:

        async def go(concurrency: int | None) -> list[Record]:
            async with Client(server.url, Asking()) as client:
                await client.look(None)
                return await send(client, requests, Book({}), concurrency=concurrency)

        open_loop = asyncio.run(go(None))
        assert server.most_at_once == 10
        assert all(record.ok for record in open_loop)
        assert max(record.late_s for record in open_loop) < 0.4  # the answers take 0.8 s each
        server.most_at_once = 0
        limited = asyncio.run(go(5))
        assert server.most_at_once == 5
        assert limited[-1].late_s > 0.3
        assert limited[-1].ttft_s is not None
        assert limited[-1].ttft_s < 0.8 + SLACK_S  # waiting here is not the server's


def test_what_there_is_when_it_is_stopped() -> None:
    requests = [planned(number, number * 0.1, prompt="slow" if number else "quick") for number in range(50)]

    def script(body: dict[str, Any], headers: dict[str, str]) -> Answer:
        return Answer(first_s=20.0 if body["messages"][0]["content"] == "slow" else 0.0)

    with ScriptedServer(script) as server:

        async def go() -> list[Record]:
            stop = asyncio.Event()
            asyncio.get_running_loop().call_later(0.6, stop.set)
            async with Client(server.url, Asking()) as client:
                await client.look(None)
                return await send(client, requests, Book({}), stop=stop)

        records = asyncio.run(go())
    assert 2 <= len(records) < 20
    assert records[0].ok
    assert {record.error for record in records[1:]} == {"interrupted"}


def test_targets_are_multiples_of_what_the_unloaded_server_needs() -> None:
    """Under load this server is ten times slower for one of the tasks."""
    seen: dict[str, int] = {"qa": 0, "maths": 0}

    def script(body: dict[str, Any], headers: dict[str, str]) -> Answer:
        task = body["messages"][0]["content"].split()[0]
        if body["max_tokens"] > 1:
            seen[task] += 1
        loaded = seen[task] > 2 and task == "maths"
        return Answer(first_s=1.0 if loaded else 0.1, gap_s=0.05)

    with ScriptedServer(script) as server, _prompts("qa", "maths") as prompts:
        words = (server.url, "--prompts", str(prompts), "--calibration", "2", "--slo-scale", "5", "--requests", "8")
        report = run_quietly(settings_of(*words, "--rate", "50", "--max-tokens", "64"))
    for task in ("qa", "maths"):
        needs, target = report.calibrated[task], report.book.of(task)
        assert needs.ttft_s is not None
        assert 0.09 < needs.ttft_s < 0.1 + SLACK_S / 2
        assert target == needs.scaled(5)
    assert report.of_task("qa").met == report.of_task("qa").requests > 0
    assert report.of_task("maths").met == 0 < report.of_task("maths").successful
    assert report.planned == 8


def test_prompts_are_fitted_to_the_arrivals(tmp_path: Path) -> None:
    """The server counts a token for every 5 characters, and 12 for its template."""

    def count(body: dict[str, Any]) -> int:
        return 12 + len(body["messages"][0]["content"]) // 5

    def script(body: dict[str, Any], headers: dict[str, str]) -> Answer:
        return Answer(usage=(count(body), body["max_tokens"]))

    arrivals = tmp_path / "a.csv"
    lengths = (40, 90, 300, 2000)
    rows = "".join(f"2023-11-16 18:15:46.{i}0,{tokens},{i + 2}\n" for i, tokens in enumerate(lengths))
    arrivals.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    card = {"id": "m", "max_model_len": 1000}
    with ScriptedServer(script, card) as server, _prompts("qa") as prompts:
        words = (server.url, "--prompts", str(prompts), "--arrivals", str(arrivals), "--slo", "5000/-")
        report = run_quietly(settings_of(*words))
        asked = [body["max_tokens"] for body, _ in server.seen[-4:]]
    assert sorted(asked) == [2, 3, 4, 5]
    found = [record.input_tokens or 0 for record in report.records]
    for tokens, wanted in zip(found, (40, 90, 300, 895), strict=True):  # 90 % of 1000, less the 5 of the answer
        assert abs(tokens - wanted) <= 2 + 0.02 * wanted
    text = report_text(report)
    assert "1 of 4 arrivals were shortened to 900 tokens in all" in text
    assert "characters a token (as measured on the server)" in text
    assert report.as_dict()["all"]["met"] == 4


def test_a_server_that_knows_no_usage_is_asked_without() -> None:
    def script(body: dict[str, Any], headers: dict[str, str]) -> Answer:
        if "stream_options" in body:
            return Answer(status=400, body=b'{"error": {"message": "unknown field stream_options"}}')
        return Answer()

    with ScriptedServer(script) as server:
        report = run_quietly(settings_of(server.url, "--requests", "3", "--rate", "50", "--calibration", "0"))
    assert report.summary().output_tokens == 9
    assert "tell no usage" in report_text(report)


def test_a_server_that_refuses_everything_is_named() -> None:
    refusing = Answer(status=401, body=b'{"error": {"message": "no key", "code": "invalid_api_key"}}')
    with (
        ScriptedServer(always(refusing)) as server,
        pytest.raises(ServerUnusableError, match="first request with 401 invalid_api_key: no key"),
    ):
        run_quietly(settings_of(server.url))


def test_the_command_prints_tables_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    parser = argparse.ArgumentParser()
    add_serve(parser)
    refused = iter([False] * 4 + [True] * 3 + [False] * 99)

    def script(body: dict[str, Any], headers: dict[str, str]) -> Answer:
        return Answer(status=429, body=b"{}") if next(refused) else Answer()

    out, plot = tmp_path / "r.json", tmp_path / "r.png"
    with ScriptedServer(script) as server:
        words = ["--requests", "12", "--rate", "100", "--slo", "9000/9000", "--output", str(out), "--plot", str(plot)]
        args = parser.parse_args([server.url, *words])
        assert args.run(args) == 0
        text = capsys.readouterr().out
        args = parser.parse_args([server.url, "--requests", "2", "--rate", "100", "--calibration", "0", "--json"])
        assert args.run(args) == 0
    assert json.loads(capsys.readouterr().out)["all"]["successful"] == 2
    assert "Successful requests:                             9" in text
    assert "    3  rejected, 429 Said" in text
    assert "75.0" in text
    found = json.loads(out.read_text())
    assert (found["schema"], found["all"]["met"], len(found["requests"])) == ("emoe-bench-serve/1", 9, 12)
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_interrupted_it_prints_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_serve(parser)
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    with ScriptedServer(always(Answer())) as server:
        args = parser.parse_args([server.url, "--requests", "500", "--rate", "10", "--calibration", "0"])
        timer.start()
        assert args.run(args) == 130
    text = capsys.readouterr().out
    assert "INTERRUPTED after" in text
    assert "of 500 requests" in text


def test_every_option_reaches_the_settings(tmp_path: Path) -> None:
    found = settings_of(
        *shlex.split(
            "http://h:1 --arrivals a.csv --time-scale 2 --length-scale 0.5 --start 3 --limit 4 --concurrency 5 "
            "--seed 6 --prompts p.jsonl --task-mix qa=2 --own-prompt-lengths --max-tokens 7 --context 8 "
            "--ignore-eos --endpoint completions --model m --api-key k --temperature 0.5 --timeout 9 "
            "--slo qa=500/40 --slo 1000/- --slo-scale 2 --calibration 1 --wrong-labels 0.2"
        )
    )
    assert found == LoadSettings(
        url="http://h:1",
        arrivals=Path("a.csv"),
        time_scale=2.0,
        length_scale=0.5,
        start=3,
        limit=4,
        concurrency=5,
        seed=6,
        prompts=Path("p.jsonl"),
        task_mix="qa=2",
        fit_prompts=False,
        max_tokens=7,
        context=8,
        ignore_eos=True,
        endpoint="completions",
        model="m",
        api_key="k",
        temperature=0.5,
        timeout_s=9.0,
        targets={"qa": Targets(0.5, 0.04), "*": Targets(1.0, None)},
        slo_scale=2.0,
        calibration=1,
        wrong_labels=0.2,
    )
    assert "api_key" not in found.as_dict()
    assert settings_of("http://h", "--rate", "3", "--requests", "4") == LoadSettings(url="http://h", rate=3, requests=4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--limit 3", "--limit needs --arrivals"),
        ("--arrivals a.csv --rate 3", "--rate is for Poisson arrivals"),
        ("--slo qa=3", "write TASK=TTFT/TPOT"),
        ("--slo =3/4", "write TASK=TTFT/TPOT"),
        ("--slo qa=3/x", "'x' is neither a number of milliseconds"),
        ("--slo qa=0/1", "'0' is neither"),
        ("--slo 1/1 --slo 2/2", "has targets already"),
        ("--no-labels --wrong-labels 0.1", "give one of them"),
        ("--max-tokens 0", "max tokens must be at least 1"),
        ("--timeout 0", "timeout must be above 0"),
        ("--temperature 3", "temperature must be between 0 and 2"),
    ],
)
def test_impossible_settings_are_named(words: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        settings_of("http://h:1", *words.split())


class _prompts:
    """A file with two prompts of each task, which begin with the task's name."""

    def __init__(self, *tasks: str) -> None:
        self._tasks = tasks

    def __enter__(self) -> Path:
        import tempfile

        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "prompts.jsonl"
        lines = [{"task": task, "prompt": f"{task} " + "word " * many} for task in self._tasks for many in (20, 40)]
        path.write_text("\n".join(map(json.dumps, lines)))
        return path

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()
