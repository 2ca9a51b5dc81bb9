"""`emoe profile` on the embedded model."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from emoe import nano
from emoe.checkpoint.fingerprint import fingerprint
from emoe.cli import main
from emoe.cli.profile import StepLine
from emoe.prediction.protocol import Trainable
from emoe.profiling import job
from emoe.profiling.training import make
from emoe.tasks.profile import Profile

QUICK = ("-n", "4", "--measure", "agreement", "--prefixes", "2", "--sensitivity-prompts", "1", "--predictors", "static")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {"task": "maths", "prompt": "Maths problem: what is 2 + 3?", "reference": "Answer: 5"},
        {"task": "code", "prompt": "Write a program that prints hello."},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_a_profile_is_made_printed_and_read(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile"
    assert main(["profile", "--prompts", str(prompts), "--out", str(out), *QUICK]) == 0
    printed = capsys.readouterr()
    for word in ("maths", "code", "insensitive layers", "GB/s", "predictors: static", str(out)):
        assert word in printed.out
    assert "prompts: 2 of 2 in 0:0" in printed.err
    made = Profile.read(out, fingerprint(nano.path()))
    assert made.source["model"] == "emoe-nano"
    assert made.sensitivity.measure == "agreement"
    assert main(["profile", "--prompts", str(prompts), "--out", str(out), *QUICK]) == 2
    assert "holds a finished profile" in capsys.readouterr().err


def test_json_is_one_object_with_the_documented_names(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["profile", "--prompts", str(prompts), "--out", str(tmp_path / "p"), "--quick", "--json", *QUICK]
    assert main(command) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    text = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    section = text.partition("### `emoe profile --json`")[2].partition("###")[0]
    assert set(re.findall(r"`(\w+)`", section)) >= set(values)
    assert values["insensitive_layers"].keys() == {"maths", "code"}
    assert values["nbytes"] > 0


def test_ctrl_c_keeps_what_is_done_and_resume_goes_on(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["profile", "--prompts", str(prompts), "--out", str(tmp_path / "p"), *QUICK]

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(job, "measure_timings", interrupt)
        assert main(command) == 130
    assert "go on with --resume" in capsys.readouterr().err
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*command, "--resume", "--seed", "5"]) == 2
    assert "begun with other settings" in capsys.readouterr().err
    with monkeypatch.context() as done:
        done.setattr("emoe.profiling.record.answer", None)
        assert main([*command, "--resume"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "none.jsonl"], "none.jsonl cannot be read"),
        (["--prompts", "bad.jsonl"], "line 2 of bad.jsonl is not JSON"),
        (["--prompts", "prompts.jsonl", "--predictors", "oracle"], "no predictor is called 'oracle'"),
        (["--prompts", "prompts.jsonl", "--resume"], "no unfinished profile"),
        (["--prompts", "prompts.jsonl", "--plot", "x.txt"], "cannot plot to x.txt"),
        (["--prompts", "prompts.jsonl", "--plot", "x.png", "--sensitivity-prompts", "0"], "leaves out"),
    ],
)
def test_mistakes_are_refused_before_the_model_is_loaded(
    options: list[str],
    message: str,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(prompts.parent)
    Path("bad.jsonl").write_text(prompts.read_text().splitlines()[0] + "\n{")
    monkeypatch.setattr("emoe.cli.profile._load", None)
    assert main(["profile", *options]) == 2
    assert message in capsys.readouterr().err


def test_prompts_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["profile"])
    assert left.value.code == 2
    assert "--prompts" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_steps_show_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    screen = Terminal()
    line = StepLine(screen)
    line.step("prompts", 10, 50)  # ten were done by an earlier run
    now[0] += 20
    line.step("prompts", 20, 50)
    line.say("something")
    now[0] += 60
    line.step("prompts", 50, 50)
    assert "prompts: 20 of 50, 1:00 left" in screen.getvalue()
    assert "\nemoe: something\n" in screen.getvalue()
    assert screen.getvalue().endswith("prompts: 50 of 50 in 1:20\n")
    log = io.StringIO()
    line = StepLine(log)
    for done in range(51):
        now[0] += 1
        line.step("prompts", done, 50)
    assert len(log.getvalue().splitlines()) == 5  # every ten seconds


def test_the_shipped_profile_is_emoe_nanos() -> None:
    made = Profile.read(nano.profile_path(), fingerprint(nano.path()))
    assert set(made.tasks) == {prompt["task"] for prompt in nano.prompts()}
    assert made.sensitivity.sensitive("converse").any()
    right = sum(made.task_of(prompt["prompt"]) == prompt["task"] for prompt in nano.prompts())
    assert right / len(nano.prompts()) > 0.9
    for name, state in made.predictors.items():
        predictor = make(name, made.shape)
        assert isinstance(predictor, Trainable)
        predictor.restore(state)
    assert {"task-popularity", "next-use"} <= {*made.predictors}
    size = sum(file.stat().st_size for file in nano.profile_path().rglob("*") if file.is_file())
    assert size < 1_500_000
