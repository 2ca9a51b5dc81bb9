"""Runs of several experiments, and the command: it goes on, reports what was refused, and makes what it says."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import emoe.nano
from emoe.bench.reproduce.asked import Settings
from emoe.bench.reproduce.experiment import Experiment, experiment
from emoe.bench.reproduce.experiments import fig16
from emoe.bench.reproduce.findings import Claim, Finding, Picture, read_finding
from emoe.bench.reproduce.keeping import forget
from emoe.bench.reproduce.running import run_all
from emoe.bench.reproduce.ways import STORES
from emoe.bench.reproduce.workbench import Workbench
from emoe.cli import main
from emoe.errors import UsageError
from emoe.tasks.profile import Profile
from tests.bench.reproduce.conftest import Open

pytestmark = pytest.mark.filterwarnings("ignore:.*requires_grad.*")


def fake(name: str, run: Callable[[Workbench], Any]) -> Experiment:
    return dataclasses.replace(experiment(name), run=run)


def finds(here: str, calls: list[str] | None = None) -> Callable[[Workbench], Finding]:
    def run(bench: Workbench) -> Finding:
        (calls if calls is not None else []).append(here)
        return Finding((Claim("a claim", "1", here, "holds"),))

    return run


def raises(error: BaseException) -> Callable[[Workbench], Finding]:
    def run(bench: Workbench) -> Finding:
        raise error

    return run


def test_one_that_is_refused_does_not_stop_the_others(open_bench: Open) -> None:
    said: list[str] = []
    bench = open_bench()
    bench.say = said.append
    outcomes = run_all(
        bench, [fake("fig3", finds("a")), fake("fig4", raises(UsageError("no references"))), fake("fig8", finds("c"))]
    )
    assert [outcome.failure for outcome in outcomes] == ["", "no references", ""]
    assert outcomes[1].kept is None and read_finding(bench.settings.out / "fig4") is None
    assert any("fig4 failed: no references" in line for line in said)
    page = (bench.settings.out / "index.html").read_text()
    assert 'id="fig3"' in page and 'id="fig8"' in page and 'id="fig4"' not in page


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a defect")])
def test_a_run_that_was_stopped_goes_on_with_what_is_left(open_bench: Open, error: BaseException) -> None:
    calls: list[str] = []
    first, last = fake("fig3", finds("a", calls)), fake("fig8", finds("c", calls))
    with pytest.raises(type(error)):
        run_all(open_bench(), [first, fake("fig4", raises(error)), last])
    assert calls == ["a"]
    outcomes = run_all(open_bench(), [first, fake("fig4", finds("b", calls)), last])
    assert calls == ["a", "b", "c"]
    assert [outcome.kept.claims[0].here for outcome in outcomes if outcome.kept] == ["a", "b", "c"]
    assert outcomes[0].seconds == 0


def test_what_was_done_is_done_again_only_in_a_run_that_began_anew(open_bench: Open) -> None:
    calls: list[str] = []
    bench = open_bench()
    what = [fake("fig3", finds("a", calls))]
    run_all(bench, what)
    run_all(open_bench(), what)
    assert calls == ["a"]
    forget(bench.settings.out)
    run_all(open_bench(), what)
    assert calls == ["a", "a"]


def test_a_finding_whose_picture_fails_is_not_done(open_bench: Open) -> None:
    def draw() -> Any:
        raise RuntimeError("no picture")

    def run(bench: Workbench) -> Finding:
        return Finding((), pictures=(Picture("bad", "a picture", draw),))

    bench = open_bench()
    with pytest.raises(RuntimeError, match="no picture"):
        run_all(bench, [fake("fig3", run)])
    assert read_finding(bench.settings.out / "fig3") is None


def test_judged_again_nothing_is_measured_and_when_it_was_stays(open_bench: Open) -> None:
    calls: list[str] = []

    def measure() -> int:
        calls.append("measured")
        return 7

    def measured(verdict: str) -> Callable[[Workbench], Finding]:
        def run(bench: Workbench) -> Finding:
            value = bench.cell("fig3", {}, measure)
            return Finding((Claim("a claim", "1", str(value), verdict, "why"),))  # type: ignore[arg-type]

        return run

    (first,) = run_all(open_bench(), [fake("fig3", measured("not measured"))])
    (again,) = run_all(open_bench(), [fake("fig3", measured("undecided"))], rejudge=True)
    assert calls == ["measured"] and first.kept is not None and again.kept is not None
    assert [claim.verdict for claim in again.kept.claims] == ["undecided"]
    assert again.kept.about["made"] == first.kept.about["made"] and "judged again" in again.kept.about
    (missing,) = run_all(open_bench(), [fake("fig8", lambda bench: bench.recorded("score"))], rejudge=True)
    assert "--rejudge measures nothing" in missing.failure


def test_what_cannot_be_done_is_said_before_the_first_begins(open_bench: Open) -> None:
    said: list[str] = []

    def refuse(bench: Workbench) -> None:
        raise UsageError("no references")

    bench = open_bench()
    bench.say = said.append
    last = dataclasses.replace(fake("fig8", finds("c")), needs=(refuse,))
    outcomes = run_all(bench, [fake("fig3", finds("a")), last])
    assert said[0] == "fig8 cannot be done: no references" and outcomes[1].failure == "no references"


def test_of_random_weights_no_accuracy_is_judged(open_bench: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workbench, "weights", "planted")
    quality, speed = run_all(open_bench(), [fake("fig4", finds("a")), fake("fig16", finds("b"))])
    assert quality.kept is not None and speed.kept is not None
    assert [claim.verdict for claim in quality.kept.claims + speed.kept.claims] == ["not measured", "holds"]
    assert quality.kept.claims[0].here == "a" and "random" in quality.kept.notes[0] + speed.kept.notes[0]


def _command(*args: str) -> int:
    return main(["reproduce", *args])


def test_the_command_on_a_tiny_model(
    tiny: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of its own, prompts of its own; random weights, so only that it runs is looked at."""
    out = tmp_path / "out"
    options = ["--model", str(tiny), "--prompts", str(prompt_file), "--quick", "--out", str(out)]
    assert _command("fig9", "table1", *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found] == ["table1", "fig9"], "in the paper's order"
    assert found[0]["failure"] is None and found[0]["seconds"] > 0
    assert set(found[0]["claims"][0]) == {"text", "paper", "here", "verdict", "why"}
    for file in ("index.html", "table1/tasks.csv", "table1/tokens.svg", "fig9/distance.png", "fig9/finding.json"):
        assert (out / file).stat().st_size > 0

    assert _command("fig9", *options) == 0
    again = capsys.readouterr()
    assert "fig9: done before" in again.err and "index.html" in again.out
    assert _command("fig9", *options, "--seed", "7") == UsageError.exit_code
    assert "holds a run with other seed" in capsys.readouterr().err
    assert _command("table2", *options) == 1
    assert "networks need at least 10" in capsys.readouterr().out
    assert _command("fig9", *options, "--trace", "no-name") == UsageError.exit_code
    assert "write NAME=TRACE" in capsys.readouterr().err


def test_the_command_lists_experiments_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert _command() == 0
    assert "fig3" in capsys.readouterr().out
    assert _command("--json") == 0
    assert {"name", "title", "question"} == set(json.loads(capsys.readouterr().out)[0])
    assert _command("fig99") == UsageError.exit_code
    assert "no experiment is called 'fig99'" in capsys.readouterr().err


def test_a_miniature_of_the_routing_experiments_on_emoe_nano(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = emoe.nano.prompts()
    prompts = tmp_path / "prompts.jsonl"
    chosen = [row for task in ("classify", "qa") for row in [row for row in rows if row["task"] == task][:6]]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    out = tmp_path / "out"
    assert _command("fig3", "--quick", "--prompts", str(prompts), "--out", str(out), "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["claims"][0]["verdict"] == "holds", "a real router's transitions say more than popularity"
    # The others on the same routes, without drawing.
    bench = Workbench(Settings(out, quick=True, prompts=prompts), lambda *_: None, lambda _: None)
    claims = {name: experiment(name).run(bench).claims[0] for name in ("table1", "fig7", "fig8", "fig9")}
    assert claims["table1"].verdict == "partly" and "Without summarise, compare, converse" in claims["table1"].why
    assert claims["fig8"].verdict in ("holds", "partly"), "prompts of one task choose alike"
    assert claims["fig9"].verdict == "not measured", "too few prompts to be 20 apart"


def test_a_miniature_of_a_speed_experiment_on_emoe_nano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of one sequence, once in each way; the times say nothing, so no verdict is looked at."""
    rows = [row for row in emoe.nano.prompts() if row["task"] == "classify"][:4]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench = Workbench(
        Settings(tmp_path / "out", quick=True, prompts=prompts, new_tokens=2), lambda *_: None, lambda _: None
    )
    bench.__dict__["profile"] = Profile.read(emoe.nano.profile_path(), bench.fingerprint)
    monkeypatch.setattr(fig16, "PROMPT", 8)
    monkeypatch.setattr(bench, "pick", lambda quick, full: quick[:1] if isinstance(quick, tuple) else 1)
    (outcome,) = run_all(bench, [experiment("fig16")])
    assert outcome.kept is not None and outcome.kept.claims and outcome.kept.pictures
    cells = list((tmp_path / "out/work/cells/batches").glob("*.json"))
    assert len(cells) == len(fig16.WAYS) * len(STORES)
    assert all(min(json.loads(cell.read_bytes())["value"]) > 0 for cell in cells)


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_terminated_it_ends_as_if_interrupted(tmp_path: Path) -> None:
    """So that servers and processes it started are stopped, too."""
    command = [sys.executable, "-m", "emoe", "reproduce", "fig4", "--out", str(tmp_path / "out")]
    with (tmp_path / "said").open("w") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        while not (tmp_path / "out/work/job.json").is_file() and process.poll() is None:
            time.sleep(0.05)
        while process.poll() is None:  # Python loses an interrupt that arrives while something is finalised
            if "interrupted" not in (tmp_path / "said").read_text():  # ending takes a while on a busy machine
                process.terminate()
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                continue
    text = (tmp_path / "said").read_text()
    assert process.returncode == 130, text
    assert "what is done is kept" in text
