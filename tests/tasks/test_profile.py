"""The profile as a directory: what is written is read; what is wrong is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.tasks.keywords import OTHER, Keywords
from emoe.tasks.lengths import Lengths
from emoe.tasks.profile import FILE, POPULARITY, PredictorStates, Profile, ProfileError, Timings
from emoe.tasks.sensitivity import Sensitivity

SHAPE = RoutingShape(2, 4, 2)
PRINT = "ab" * 32


def made() -> Profile:
    rng = np.random.default_rng(0)
    shares = {task: SHAPE.normalised(rng.random((2, 4))) for task in ("qa", "a/b", OTHER)}
    return Profile(
        fingerprint=PRINT,
        shape=SHAPE,
        tasks=("qa", "a/b"),
        keywords=Keywords({"qa": {"which": 1.5, "who is": 2.0}}),
        lengths={"qa": Lengths.of([2, 3]), OTHER: Lengths.of([2, 3, 40], cut=1)},
        sensitivity=Sensitivity("agreement", {"agreement": {"qa": np.array([0.9, 0.2])}}, 2),
        popularity=shares,
        predictors=PredictorStates({"static": {"shares": rng.random((2, 4)), "seen": np.arange(3)}}),
        timings=Timings(load_bytes_per_s=1e9, expert_load_s=2e-3, reader="cached", device="cpu"),
        tokens={"qa": 10, OTHER: 50},
        source={"model": "tiny"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made().write(tmp_path / "profile")


def test_what_is_written_is_read(folder: Path) -> None:
    before, after = made(), Profile.read(folder, PRINT)
    for name in ("fingerprint", "shape", "tasks", "timings", "tokens", "source"):
        assert getattr(after, name) == getattr(before, name)
    assert after.keywords.weights == before.keywords.weights
    assert after.lengths["qa"].mean == 2.5
    assert after.lengths[OTHER].cut == pytest.approx(1 / 3, abs=1e-3)
    assert after.sensitivity.sensitive("qa").tolist() == [False, True]
    assert set(after.popularity) == {"qa", "a/b", OTHER}
    for task, shares in before.popularity.items():
        assert after.popularity[task].dtype == np.float64
        assert after.popularity[task] == pytest.approx(shares, abs=1e-6)
    assert list(after.predictors) == ["static"]
    for name, array in before.predictors["static"].items():
        assert after.predictors["static"][name].dtype == array.dtype
        assert np.array_equal(after.predictors["static"][name], array)


def test_unknown_tasks_get_what_all_prompts_had(folder: Path) -> None:
    profile = Profile.read(folder)
    for task in ("never seen", None, OTHER):
        assert profile.popularity_of(task) is profile.popularity[OTHER]
        assert profile.lengths_of(task) is profile.lengths[OTHER]
    assert profile.popularity_of("qa") is profile.popularity["qa"]
    assert profile.lengths_of("qa") is profile.lengths["qa"]
    assert profile.task_of("Who is that?") == "qa"
    assert profile.task_of("Who is that?", "code") == "code"


def test_another_models_profile_is_refused_with_both_fingerprints(folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        Profile.read(folder, "cd" * 32, model="big-model")
    for part in (PRINT, "cd" * 32, "tiny", "big-model", "emoe profile"):
        assert part in str(caught.value)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header = json.loads((folder / FILE).read_text())
    change(header)
    (folder / FILE).write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(version=2), "version 2, and this emoe reads 1: update emoe"),
        (lambda h: h.update(version=0), "make the profile again"),
        (lambda h: h.update(format="other"), "is no profile"),
        (lambda h: h.pop("lengths"), "'lengths' is missing"),
        (lambda h: h["shape"].update(layers=3), "profile.json is damaged"),
        (lambda h: h["keywords"]["weights"].update(qa={"Who": 1}), "'Who' of task 'qa' can never match"),
        (lambda h: h["keywords"].update(weights=[1]), "profile.json is damaged"),
        (lambda h: h["keywords"]["weights"].update(poetry={"rhyme": 1}), "poetry"),
        (lambda h: h["sensitivity"].update(measure="similarity"), "'similarity' was not measured"),
        (lambda h: h["timings"].update(speed=1), "profile.json is damaged"),
        (lambda h: h["predictors"].update({"../x": {"nbytes": 1, "sha256": ""}}), "no name of a predictor"),
        (lambda h: h["predictors"].update({"emoe-a": {"nbytes": 1, "sha256": ""}}), "emoe-a.safetensors is missing"),
        (lambda h: h.update(predictors=3), "profile.json is damaged"),
    ],
)
def test_a_header_that_says_something_else_is_named(folder: Path, change: Any, message: str) -> None:
    edit(folder, change)
    with pytest.raises(ProfileError, match=message):
        Profile.read(folder)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_damaged_arrays_are_named(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    file = folder / POPULARITY
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with pytest.raises(ProfileError, match=r"popularity\.safetensors is damaged"):
        Profile.read(folder)
    file.write_bytes(whole)
    file = folder / "predictors" / "static.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    profile = Profile.read(folder)  # read when asked for
    with pytest.raises(ProfileError, match=r"static\.safetensors is damaged"):
        profile.predictors["static"]


def test_no_profile_half_a_profile_and_rubbish_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ProfileError, match=r"holds no profile\.json"):
        Profile.read(tmp_path)
    (folder / FILE).write_bytes(b"{")
    with pytest.raises(ProfileError, match="cannot be read as JSON"):
        Profile.read(folder)
    made().write(folder)
    (folder / POPULARITY).unlink()
    with pytest.raises(ProfileError, match="cannot be read"):
        Profile.read(folder)


def test_a_writer_that_dies_leaves_no_profile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: object) -> bytes:
        raise OSError("disk full")

    monkeypatch.setattr("emoe.tasks.profile.save_arrays", die)
    with pytest.raises(ProfileError, match="disk full"):
        made().write(folder)
    with pytest.raises(ProfileError, match=r"holds no profile\.json"):
        Profile.read(folder)


def test_parts_that_do_not_fit_are_refused() -> None:
    import dataclasses

    with pytest.raises(UsageError, match=r"popularity of task 'qa' is \[3, 4\]"):
        dataclasses.replace(made(), popularity={"qa": np.ones((3, 4))})
    with pytest.raises(UsageError, match="sensitivity of 5 layers"):
        dataclasses.replace(made(), sensitivity=Sensitivity.unknown(5))
    with pytest.raises(UsageError, match="poetry"):
        dataclasses.replace(made(), lengths={"poetry": Lengths.of([1])})
    with pytest.raises(UsageError, match="other"):
        dataclasses.replace(made(), tasks=("qa", "a/b", OTHER))


def test_reading_a_profile_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys; from emoe.tasks.profile import Profile; Profile.read(sys.argv[1]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
