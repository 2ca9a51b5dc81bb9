"""`emoe generate` on the embedded model."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from emoe import nano
from emoe.cli import main
from emoe.cli.session import _Stream, choose_threads, stop_on_interrupt
from emoe.routing.trace import Trace

PROMPT = "Write code for this task.\n\nPrint hello."


def run_json(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert main(["generate", "-p", PROMPT, "-n", "12", "--json", *args]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_text_streams_to_stdout_and_figures_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", PROMPT, "-n", "12", "--expert-memory", "40%"]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("\n")
    assert printed.out.strip()
    assert "emoe-nano: " in printed.err
    assert "reader cached" in printed.err
    assert "hits" in printed.err
    assert "LOSSY" not in printed.err


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate. Mend"),
        ("{{ messages[0].content ", "refuses this conversation: unexpected end of template"),
    ],
)
def test_a_template_that_refuses_is_named(
    template: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in nano.path().iterdir():
        (model / file.name).symlink_to(file)
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").write_text(template)
    options = ["generate", str(model), "-p", "Hi", "-n", "2", "-q"]
    assert main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"emoe: error: the chat template of {model} ") and error.count("\n") == 1
    assert said in error and "--raw" in error
    assert main([*options, "--raw"]) == 0


def test_exact_gives_the_text_of_everything_resident(capsys: pytest.CaptureFixture[str]) -> None:
    full, small = run_json(capsys), run_json(capsys, "--expert-memory", "2/layer")
    assert small["text"] == full["text"]
    assert full["stats"]["hit_rate"] == 1
    assert small["stats"]["misses"] > 0
    assert small["stats"]["peak_resident_bytes"] <= small["stats"]["budget_bytes"]


def test_figures_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run_json(capsys)
    assert answer["model"] == "emoe-nano"
    assert answer["prompt"] == PROMPT
    assert 1 <= answer["new_tokens"] <= 12
    assert 0 < answer["time_to_first_token_s"] <= answer["seconds"]
    assert answer["stopped"] is False


def test_a_lossy_mode_is_named_even_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "-p", PROMPT, "-n", "4", "--expert-memory", "40%"]
    assert main([*args, "--quiet", "--mode", "resident"]) == 0
    assert "LOSSY: in mode 'resident'" in capsys.readouterr().err
    assert main([*args, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_balanced_is_lossy_as_far_as_its_dial_says(capsys: pytest.CaptureFixture[str]) -> None:
    """With the profile that emoe-nano ships."""
    full = run_json(capsys)
    careful = run_json(capsys, "--expert-memory", "50%", "--mode", "balanced", "--sensitivity-threshold", "1.1")
    assert (careful["text"], careful["stats"]["lossy"]) == (full["text"], False)
    args = ["generate", "-p", PROMPT, "-n", "4", "--expert-memory", "50%", "--mode", "balanced", "--task", "classify"]
    assert main([*args, "--quiet"]) == 0
    assert "LOSSY: in mode 'balanced'" in capsys.readouterr().err
    assert main([*args[:-2], "--task", "x", "--mode", "exact"]) == 2
    assert "--mode balanced" in capsys.readouterr().err


def test_what_looks_ahead_is_named_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    full = run_json(capsys)
    for options in (["--prefetch", "next-gate"], ["--predictor", "static", "--replan-prompts", "adaptive"]):
        answer = run_json(capsys, "--expert-memory", "50%", "--eviction", "lru", *options)
        assert answer["text"] == full["text"]
        ahead = answer["stats"]["prefetch"]
        assert ahead["issued"] == ahead["used"] + ahead["unused"] + ahead["cancelled"] + ahead["waiting"]
    args = ["generate", "-p", PROMPT, "-n", "8", "--expert-memory", "50%", "--prefetch", "next-gate"]
    assert main(args) == 0
    assert "prefetches used" in capsys.readouterr().err


def test_the_prompt_can_be_piped_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert main(["generate", "-n", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == PROMPT


def test_raw_leaves_the_template_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys)["prompt_tokens"] > run_json(capsys, "--raw")["prompt_tokens"]


def test_sampling_repeats_with_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--temperature", "1.5", "--seed", "3")
    assert run_json(capsys, *options)["text"] == run_json(capsys, *options)["text"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-p", "   "], "the prompt is empty"),
        (["-p", "x", "--temperature", "-1"], "--temperature must be a number of at least 0"),
        (["-p", "x", "--temperature", "nan"], "--temperature must be a number of at least 0"),
        (["-p", "caf\udce9"], "the prompt is no UTF-8 text"),
        (["-p", "x", "--top-p", "2"], "--top-p must be above 0 and at most 1"),
        (["-p", "x", "--temperature", "0", "--top-k", "5"], "no effect"),
        (["-p", "word " * 2000], "was made for 1024 in all"),
        (["-p", "x", "--task", "code"], "trace"),
    ],
)
def test_what_cannot_be_meant_exits_with_2(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *args]) == 2
    assert message in capsys.readouterr().err


def test_a_task_that_the_profile_does_not_know_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "-p", "x", "-n", "1", "--expert-memory", "40%", "--mode", "balanced", "--task"]
    assert main([*args, "cod"]) == 0
    assert "the profile knows no task 'cod', so nothing is known of it; it knows summarise, " in capsys.readouterr().err
    assert main([*args, "code"]) == 0
    assert "knows no task" not in capsys.readouterr().err


def test_a_pipe_that_holds_no_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "chat"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
        assert main([command]) == 2
        assert "utf-8 text: 'utf-8' codec can't decode byte 0xe9" in capsys.readouterr().err


def test_a_long_answer_ends_at_the_models_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", "word " * 600, "-n", "900", "--json"]) == 0
    printed = capsys.readouterr()
    assert "tokens at the latest" in printed.err
    answer = json.loads(printed.out)
    assert answer["prompt_tokens"] + answer["new_tokens"] <= 1024


def test_the_trace_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "routing.trace"
    assert main(["generate", "-p", PROMPT, "-n", "4", "--trace", str(file), "--task", "code"]) == 0
    assert f"recorded in {file}" in capsys.readouterr().err
    trace = Trace.read(file)
    assert list(trace.tasks) == ["code"]


def test_the_first_interrupt_ends_the_answer_with_its_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put = _Stream.put

    def put_and_interrupt(self: _Stream, value: Any) -> None:
        put(self, value)
        if self._answer.new_tokens == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(_Stream, "put", put_and_interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert main(["generate", "-p", PROMPT, "-n", "50"]) == 130
    assert "+ 4 tokens" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    choose_threads(None, "some/model")
    choose_threads(None, None)
    choose_threads(3, None)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    choose_threads(None, None)
    assert chosen == [1, 3]


def test_the_second_interrupt_leaves_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)
