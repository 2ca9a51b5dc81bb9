"""The command itself: help, exit codes, errors in one line, interrupts and closed pipes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import emoe
from emoe import nano
from emoe.cli import build_parser, main, quantise
from emoe.errors import UsageError
from tests.conftest import Checkpoints


def emoe_process(*args: str, **kwargs: object) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs
    return subprocess.Popen([sys.executable, "-m", "emoe", *args], text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def test_help_and_version_are_quick_because_torch_is_not_imported() -> None:
    code = (
        "import sys; from emoe.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert "generate" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"emoe {emoe.__version__}\n"


def test_without_a_command_it_helps_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: emoe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--memory", "8G"], "8GiB for powers of 1024"),
        (["plan", "--batch", "0"], "at least 1, not '0'"),
        (["plan", "-c", "1e3"], "whole number"),
        (["generate", "--expert-memory", "140%"], "more than all experts"),
        (["generate", "--mode", "fast"], "invalid choice: 'fast'"),
        (["frobnicate"], "there is no command 'frobnicate': there are plan, generate, "),
        (["run", "some/model"], "there is no command 'run': `emoe chat MODEL` talks, `emoe generate MODEL -p TEXT`"),
        (["servee"], "did you mean serve? (`emoe --help`"),
        (["bench", "decod"], "there is no benchmark 'decod': did you mean decode? (`emoe bench --help`"),
        (["serve", "-m", "x", "--port", "80"], "emoe serve does not know -m: give MODEL without -m (`emoe serve -"),
        (
            ["serve", "x", "--ctx-size=9", "-ngl", "3"],
            "for --ctx-size there is --max-model-len here; for -ngl there is --device here",
        ),
        (
            ["generate", "x", "-ngl", "99"],
            "emoe generate does not know -ngl: for -ngl there is --device here (`emoe gen",
        ),
        (["generate", "x", "--prompt", "-ngl"], "argument -p/--prompt: expected one argument"),
        (["generate", "x", "-p", "Hello", "-ngl", "99"], "for -ngl there is --device here"),
        (["generate", "x", "-np=4", "-tp", "2"], "for -tp there is --expert-devices here"),
        (["generate", "x", "-np", "4"], "emoe generate does not know -np (`emoe generate"),
        (["demo", "-tp", "2"], "emoe demo does not know -tp ("),
        (["chat", "-hf", "some/model"], "give MODEL without -hf"),
        (["serve", "--model", "some/model"], "give MODEL without --model"),
        (["bench", "decode", "-ngl", "9"], "emoe bench decode does not know -ngl"),
        (["generate", "-c", "9", "x"], "nothing is to be set for -c: the context is the model's"),
        (["generate", "--expert-memroy", "3"], "did you mean --expert-memory?"),
        (["generate", "x", "Hello"], "emoe generate does not know Hello: a prompt goes after -p"),
        (["inspect", "x", "y"], "emoe inspect does not know y ("),
        (["generate", "--seed", "-1"], "from 0 to 4294967295, not '-1'"),
        (["simulate", "--seed", "4294967296"], "from 0 to 4294967295"),
        (["bench", "decode", "--seed", "x"], "from 0 to 4294967295"),
    ],
)
def test_malformed_options_exit_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    line = one_line(capsys)
    assert message in line
    assert line.endswith(" --help` lists what there is)\n")


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; nothing on stdout."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("emoe: error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_american_spelling_is_understood() -> None:
    assert build_parser().parse_args(["quantize", "--expert-dtype", "int8"]).run is quantise.run


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "./nothing"]) == 2
    assert "there is no directory nothing" in one_line(capsys)


def test_a_truncated_checkpoint(checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copytree(checkpoints("qwen3_moe"), tmp_path / "cut"))
    weights = path / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 10)
    capsys.readouterr()  # making the checkpoint printed too
    for command in ("plan", "inspect"):
        assert main([command, str(path)]) == 3
        assert "model.safetensors is truncated" in one_line(capsys)


def test_a_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path)]) == 4
    assert "dense model" in one_line(capsys)


def test_a_budget_below_the_floor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--expert-memory", "1kB"]) == 5
    assert "smallest budget that works" in one_line(capsys)


def test_mistakes_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from emoe.cli import main\n"
        "wrong = (['--expert-memory', '1kB'], ['./nothing'], [sys.argv[1]], ['--predictor', 'x'],\n"
        "         ['--prefetch', 'plan'], ['--eviction', 'fifo'], ['--sensitivity-threshold', '-1'],\n"
        "         ['--prefetch', 'next-gate', '--mode', 'resident'], ['--replan-prompts', 'adaptive'])\n"
        "codes = [main(['generate', '-p', 'x', *args]) for args in wrong]\n"
        "print(codes, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{[5, 2, 3, *[2] * 6]} False\n"


def test_a_model_without_a_tokenizer_cannot_be_given_text(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(checkpoints("qwen3_moe"))
    capsys.readouterr()
    for command in (["generate", "-p", "x"], ["chat"]):
        assert main([*command, path]) == 2
        assert "has no tokenizer" in one_line(capsys)


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(UsageError):
        main(["plan", "./nothing", "--debug"])


def test_an_interrupt_leaves_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("emoe.cli.plan.plan_text", interrupted)
    assert main(["plan"]) == 130
    assert capsys.readouterr().err == "emoe: interrupted\n"


def test_a_closed_pipe_is_no_crash() -> None:
    process = emoe_process("inspect", "--layer", "0")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_an_interrupt_while_loading_leaves_without_a_traceback() -> None:
    process = emoe_process("generate", "-p", "Hello")
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 60
    while "libtorch" not in maps.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)  # until it is in the midst of its imports
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.strip() == "emoe: interrupted"


def test_a_terminal_that_cannot_show_a_character_gets_another(tmp_path: Path) -> None:
    (tmp_path / "modèle").symlink_to(nano.path())
    process = emoe_process("plan", str(tmp_path / "modèle"), env=os.environ | {"PYTHONIOENCODING": "ascii"})
    text, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "mod?le (qwen3_moe" in text


def test_a_warning_says_who_warns() -> None:
    process = emoe_process("generate", "-p", "Hi", "-n", "2", env=os.environ | {"CC": "/nowhere/cc"})
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "emoe: few tokens are computed by torch, " in errors
    assert all(line.startswith("emoe: ") for line in errors.splitlines())
