"""`emoe serve` as a process: its plan, its refusals, its start, and how it ends."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from emoe.cli import main
from emoe.cli.serve import add_parser, server_settings
from emoe.cli.serve_options import number_of_port, origin, task_slo
from emoe.engine.interface import TaskTargets


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("EMOE_"):
            monkeypatch.delenv(name)


@contextmanager
def served(*args: str, **environ: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client, list[str]]]:
    """The process, a client for its URL, and the lines that it has printed on stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "emoe", "serve", "--port", "0", *args],
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environ,
    )
    assert process.stderr is not None and process.stdout is not None
    lines: list[str] = []
    url = None
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"at (http://\S+)/v1", line):
            url = found[1]
            break
    assert url is not None, "".join(lines)
    reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
    reader.start()
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield process, client, lines
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        reader.join(30)
        process.stdout.close()
        process.stderr.close()


LONG = {"prompt": "Hello", "stream": True, "ignore_eos": True, "max_tokens": 900}


def test_term_lets_what_runs_finish() -> None:
    with served("--expert-memory", "40%", "--status-interval", "0.2") as (process, client, lines):
        upgrade = {"Connection": "Upgrade", "Upgrade": "h2c"}  # as Java's client offers at first
        assert client.get("/health", headers=upgrade).json() == {"status": "ok"}
        short = {**LONG, "max_tokens": 150}
        with client.stream("POST", "/v1/completions", json=short) as reply:
            text = reply.iter_lines()
            assert next(text).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 20
            while client.get("/health").status_code == 200:
                assert time.monotonic() < deadline
            refused = client.post("/v1/completions", json={"prompt": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            rest = "".join(text)
        assert '"finish_reason":"length"' in rest and rest.endswith("data: [DONE]")
        assert process.wait(30) == 0
    log = "".join(lines)
    assert re.search(r"serving emoe-nano at http://127.0.0.1:\d+/v1: mode exact, 9.00 MiB for experts of 22.50", log)
    assert "stopping: 1 running and 0 waiting requests get 30 s" in log
    assert "1 running, 0 waiting; " in log and log.endswith("emoe: stopped\n")
    assert "Traceback" not in log and "uvicorn" not in log and "upgrade" not in log


def test_what_does_not_finish_in_time_ends_with_a_named_error() -> None:
    with served("--shutdown-timeout", "0.2", "--max-read-bytes-per-s", "20MB", "--expert-memory", "10%") as (
        process,
        client,
        lines,
    ):
        with client.stream("POST", "/v1/completions", json=LONG) as reply:
            text = reply.iter_lines()
            next(text)
            process.send_signal(signal.SIGINT)
            rest = "".join(text)
        assert "shutting_down" in rest and rest.endswith("data: [DONE]")
        assert process.wait(30) == 0
    assert "the requests that are left are cancelled" in "".join(lines)


def test_a_lossy_mode_says_so_and_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    options = ("--mode", "resident", "--expert-memory", "40%", "--served-model-name", "tiny")
    form = {"EMOE_EXPERT_DTYPE": "int8", "EMOE_EXPERT_CACHE": str(tmp_path)}
    with served(*options, EMOE_API_KEY="k", EMOE_SLO_TTFT_MS="60000", **form) as (process, client, lines):
        log = "".join(lines)
        assert "LOSSY: in mode 'resident'" in log and "mode resident, int8 experts (LOSSY)" in log
        assert "LOSSY: experts are stored and computed as int8" in log
        assert client.get("/v1/models").status_code == 401
        client.headers["authorization"] = "Bearer k"
        card = client.get("/v1/models").json()["data"][0]
        assert (card["id"], card["emoe"]["mode"], card["emoe"]["lossy"]) == ("tiny", "resident", True)
        assert card["emoe"]["expert_dtype"] == "int8"
        said = client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2}).json()["emoe"]
        assert said["lossy"] is True and said["slo_met"] is True
        info = next(line for line in client.get("/metrics").text.splitlines() if line.startswith("emoe:info{"))
        assert 'lossy="true"' in info and 'expert_dtype="int8"' in info
        with client.stream("POST", "/v1/completions", json=LONG) as reply:
            next(reply.iter_lines())
            process.send_signal(signal.SIGTERM)
            while not any("a second signal" in line for line in lines):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == -signal.SIGTERM


def test_the_plan_is_printed_before_anything_is_loaded() -> None:
    code = (
        "import sys; from emoe.cli import main\n"
        "code = main(['serve', '--dry-run', '--expert-memory', '40%'])\n"
        "print(code, 'torch' in sys.modules, 'fastapi' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    assert last == "0 False False"
    text = "\n".join(lines)
    assert re.search(r"experts, resident +8\.91 MiB +38 of 96 \(40%\)", text)
    assert re.search(r"KV memory +96\.38 MiB +16384 tokens of 6\.00 KiB; a context is 1024", text)


def test_the_plan_in_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["serve", "--dry-run", "--json", "--kv-memory", "20MiB", "--max-num-seqs", "4", "--memory", "1GiB"]
    assert main(argv) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["kv_tokens"], plan["max_running"], plan["context"], plan["fit"]) == (3328, 4, 1024, "all")
    assert plan["kv_bytes"] <= 20 << 20
    assert plan["total_bytes"] <= 1 << 30


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--memory", "100MiB"], 5, "needs .* to be served"),
        (["--memory", "100MiB", "--dry-run"], 5, "needs .* to be served"),
        (["--expert-memory", "1kB"], 5, "smallest budget that works"),
        (["--max-model-len", "4096"], 2, "made for 1024 tokens"),
        (["--kv-memory", "1kB"], 2, "raise --kv-memory"),
        (["--json"], 2, "--json is for --dry-run"),
        (["--trace", "x.npz"], 2, "--trace"),
        (["--predictor", "nobody"], 2, "nobody"),
        (["--config", "nothing.toml"], 2, "cannot read --config nothing.toml"),
        (["./nothing"], 2, "there is no directory nothing"),
        (["--max-num-batched-tokens", "8"], 2, "a step of 8 tokens cannot hold 32 requests"),
        (["--max-num-batched-tokens", "8"], 2, r"lower max_running \(--max-num-seqs\)"),
        (["--max-num-batched-tokens", "8", "--dry-run"], 2, "a step of 8 tokens cannot hold 32 requests"),
        (["--host", "203.0.113.7", "--port", "0"], 2, "cannot listen on 203.0.113.7:0"),
    ],
)
def test_refused_before_loading(argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *argv]) == code
    assert re.search(message, capsys.readouterr().err)


ORIGINS_NEVER_MET = (
    "",
    "a.example",
    "https://a.example/",
    "https://a.example/page",
    "https://A.example",
    "https://*.a",
)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "70000"], "port from 0 to 65535"),
        (["--slo-ttft-ms", "0"], "milliseconds above 0"),
        (["--request-timeout", "-1"], "number of seconds"),
        (["--request-timeout", "nan"], "number of seconds"),
        (["--task-slo", "qa"], "must be like qa=500/50"),
        (["--task-slo", "qa=/"], "must be like qa=500/50"),
        (["--scheduler", "lifo"], "invalid choice"),
        (["--max-queue", "0"], "at least 1"),
        (["--max-body-size", "4M"], "4MiB for powers of 1024"),
        (["--max-body-size", "0"], "argument --max-body-size: must be above 0"),
        (["--keep-alive", "0"], "argument --keep-alive: must be a number of seconds above 0"),
        (["--write-timeout", "0"], "argument --write-timeout: must be a number of seconds above 0"),
        (["--api-key", ""], "argument --api-key: is empty"),
        (["--served-model-name", " "], "argument --served-model-name: is empty"),
        *((["--cors-origin", each], "must be like https://chat.example:8443") for each in ORIGINS_NEVER_MET),
    ],
)
def test_malformed_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["serve", *argv])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["*", "null", "http://localhost:3000", "https://a.example", "app://-", "http://[::1]:8"]
)
def test_origins_as_browsers_send_them(text: str) -> None:
    assert origin(text) == origin(f" {text}") == text


def test_targets_of_tasks() -> None:
    assert task_slo("qa=500/50") == ("qa", TaskTargets(ttft_slo_s=0.5, tpot_slo_s=0.05))
    assert task_slo("code = /100") == ("code", TaskTargets(tpot_slo_s=0.1))
    assert task_slo("a b=20/") == ("a b", TaskTargets(ttft_slo_s=0.02))
    assert number_of_port("0") == 0


def test_a_port_in_use_is_found_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def find(name: str) -> Any:
        return None if name == "uvicorn" else name

    monkeypatch.setattr("emoe.cli.serve.find_spec", find)
    assert main(["serve"]) == 2
    assert "emoe serve needs uvicorn: pip install 'emoe[serve]'" in capsys.readouterr().err


def test_help_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert titles == ["options", "model and memory", "scheduling", "server", "limits", "observability"]


def test_a_file_sets_it_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('expert-memory = "40%"\nmax-num-seqs = 8\ntask-slo = ["qa=500/50", "code=/100"]\ndry-run = true\n')
    assert main(["serve", "--config", str(file), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["expert_memory"], plan["max_running"]) == ("40%", 8)


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [
        ({"do_sample": False, "temperature": 0.6, "max_new_tokens": 200}, (0.0, 1.0, None, 200)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}, (0.6, 0.95, 20, None)),
        ({"temperature": 0.6, "top_k": 0}, (0.6, 1.0, None, None)),
        ({}, (1.0, 1.0, None, None)),
    ],
)
def test_what_requests_leave_out_comes_from_the_model(stated: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    from transformers import GenerationConfig

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["serve", "--request-timeout", "0", "--cors-origin", "http://a"])
    made = server_settings(args.layers.resolve(args, {}), GenerationConfig(**stated), "qa")
    assert (made.temperature, made.top_p, made.top_k, made.max_tokens) == wanted
    assert (made.request_timeout_s, made.cors_origins, made.default_task) == (None, ("http://a",), "qa")
