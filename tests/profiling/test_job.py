"""A whole profile, made at once or with interruptions at every stage."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import emoe
from emoe.checkpoint.fingerprint import fingerprint
from emoe.errors import UsageError
from emoe.model.bind import binding_of
from emoe.profiling import job
from emoe.profiling.job import make_profile
from emoe.profiling.prompts import Prompt, read_prompts
from emoe.profiling.settings import ProfileSettings, check_out
from emoe.tasks.keywords import OTHER
from emoe.tasks.profile import Profile

SETTINGS = ProfileSettings(
    new_tokens=5, sensitivity_prompts=1, measure="agreement", predictors=("static", "task-popularity"), seed=1
)
Step = Callable[[str, int, int], None]


def make(
    loaded: Any, prompts: list[Prompt], out: Path, settings: ProfileSettings = SETTINGS, step: Step = lambda *_: None
) -> Profile:
    model, tokenizer = loaded
    return make_profile(model, tokenizer, prompts, settings, out, name="tiny", step=step, say=lambda _: None)


def learned(profile: Profile) -> dict[str, Any]:
    """All but what the clock says."""
    return {
        "fingerprint": profile.fingerprint,
        "shape": profile.shape,
        "tasks": profile.tasks,
        "keywords": profile.keywords.as_json(),
        "lengths": {task: each.as_json() for task, each in profile.lengths.items()},
        "sensitivity": profile.sensitivity.as_json(),
        "popularity": {task: shares.tolist() for task, shares in profile.popularity.items()},
        "predictors": {n: {k: a.tolist() for k, a in s.items()} for n, s in profile.predictors.items()},
        "tokens": dict(profile.tokens),
        "source": dict(profile.source),
    }


def test_a_profile_of_a_model(loaded: Any, checkpoint: Path, prompt_file: Path, tmp_path: Path) -> None:
    prompts = read_prompts(prompt_file)
    stages: list[str] = []
    made = make(loaded, prompts, tmp_path / "out", step=lambda stage, *_: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["prompts", "sensitivity"]
    assert not (tmp_path / "out" / "work").exists()
    read = Profile.read(tmp_path / "out", fingerprint(checkpoint))
    assert read.tasks == ("maths", "chat")
    assert read.lengths["maths"].answers == 4
    assert read.lengths[OTHER].answers == 8
    assert set(read.popularity) == {"maths", "chat", OTHER}
    for shares in read.popularity.values():
        assert shares.sum(axis=1) == pytest.approx(np.full(3, read.shape.top_k), abs=1e-5)
    assert read.tokens[OTHER] == read.tokens["maths"] + read.tokens["chat"]
    assert read.sensitivity.measure == "agreement"
    assert set(read.sensitivity.curves) == {"agreement", "perplexity"}
    assert read.sensitivity.prompts == {"maths": 1, "chat": 1}
    assert set(read.predictors) == {"static", "task-popularity"}
    assert read.timings.load_bytes_per_s
    assert read.timings.token_s
    assert read.source["model"] == "tiny"
    assert made.fingerprint == read.fingerprint
    assert read.keywords.task_of("tell me a story") in ("chat", OTHER)


def test_a_budget_changes_nothing_that_is_learned(
    loaded: Any, checkpoint: Path, prompt_file: Path, tmp_path: Path
) -> None:
    prompts = read_prompts(prompt_file)[:2]
    full = make(loaded, prompts, tmp_path / "full")
    model, tokenizer = emoe.load(checkpoint, expert_memory="60%")
    small = make((model, tokenizer), prompts, tmp_path / "small")
    assert emoe.stats(model)["misses"]
    emoe.close(model)
    assert learned(small) == learned(full)


def test_interrupted_at_every_stage_it_learns_the_same(
    loaded: Any, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = read_prompts(prompt_file)
    whole = learned(make(loaded, prompts, tmp_path / "whole"))
    monkeypatch.setattr("emoe.profiling.record.PART_S", 0)
    out = tmp_path / "out"

    def stop_at(wanted: str, count: int) -> Step:
        def step(stage: str, done: int, total: int) -> None:
            if (stage, done) == (wanted, count):
                raise KeyboardInterrupt

        return step

    for stage, done in (("prompts", 3), ("prompts", 8), ("sensitivity", 1)):
        with pytest.raises(KeyboardInterrupt):
            make(loaded, prompts, out, step=stop_at(stage, done))
        check_out(out, resume=True)
    with monkeypatch.context() as broken:
        broken.setattr(job, "measure_timings", stop_at("x", 0))  # fails with TypeError
        with pytest.raises(TypeError):
            make(loaded, prompts, out)
    assert sorted(file.stem for file in (out / "work" / "predictors").iterdir()) == ["static", "task-popularity"]
    with monkeypatch.context() as no_more:
        no_more.setattr("emoe.profiling.training.make", None)
        no_more.setattr("emoe.profiling.record.answer", None)
        assert learned(make(loaded, prompts, out)) == whole


def test_a_run_begun_with_something_else_is_not_gone_on_with(loaded: Any, prompt_file: Path, tmp_path: Path) -> None:
    prompts = read_prompts(prompt_file)
    out = tmp_path / "out"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(loaded, prompts, out, step=stop)
    with pytest.raises(UsageError, match="begun with other prompts: go on with the same"):
        make(loaded, prompts[1:], out)
    with pytest.raises(UsageError, match="begun with other settings"):
        make(loaded, prompts, out, dataclasses.replace(SETTINGS, seed=2))
    make(loaded, prompts, out)


def test_folders_that_hold_something_are_refused(loaded: Any, prompt_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_out(out, resume=False)
    with pytest.raises(UsageError, match="no unfinished profile"):
        check_out(out, resume=True)
    make(loaded, read_prompts(prompt_file)[:2], out, dataclasses.replace(SETTINGS, sensitivity_prompts=0))
    with pytest.raises(UsageError, match="holds a finished profile"):
        check_out(out, resume=False)
    (out / "work").mkdir()
    (out / "work" / "job.json").write_text("{}")
    (out / "profile.json").unlink()
    with pytest.raises(UsageError, match="go on with it with --resume"):
        check_out(out, resume=False)
    shutil.rmtree(out / "work")
    with pytest.raises(UsageError, match="not an empty folder"):
        check_out(out, resume=False)


def test_without_sensitivity_every_layer_counts_as_sensitive(loaded: Any, prompt_file: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, sensitivity_prompts=0, predictors=())
    made = make(loaded, read_prompts(prompt_file)[:2], tmp_path / "out", settings)
    read = Profile.read(tmp_path / "out")
    assert not made.sensitivity.curves
    assert read.sensitivity.sensitive("maths").all()
    assert not read.predictors


def test_a_lossy_mode_is_refused(checkpoint: Path, prompt_file: Path, tmp_path: Path) -> None:
    model, tokenizer = emoe.load(checkpoint, expert_memory="60%", mode="resident")
    with pytest.raises(UsageError, match="mode 'exact'"):
        make((model, tokenizer), read_prompts(prompt_file), tmp_path / "out")
    assert binding_of(model).runtime.prompts == 0
    emoe.close(model)
