"""The history of a planted checkpoint: other prompts, the same routes, and nothing of what is fed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emoe.bench.learning import learned, profile_of
from emoe.bench.plant.card import ROUTES, read_card
from emoe.bench.plant.history import HISTORY, add_history, check_history, history_of
from emoe.bench.plant.resample import fit, fit_others, other_prompts
from emoe.bench.plant.shapes import PUBLISHED
from emoe.bench.plant.write import plant
from emoe.errors import UsageError
from emoe.routing.trace import Trace
from emoe.tasks.profile import Profile
from tests.bench.plant.made_up import made_up_trace

TOKENS = 50
"""Of prompts of 20: the third is cut in the middle."""


@pytest.fixture(scope="module")
def recorded() -> Trace:
    about: tuple[dict[str, str], ...] = tuple({"repetition": "yes"} if n == 4 else {} for n in range(10))
    task = np.arange(10, dtype=np.int32) % 2
    return replace(made_up_trace(200, 5, prompts=10), prompts=about, task=task, tasks=("a", "b"))


@pytest.fixture(scope="module")
def planted(recorded: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    plant(PUBLISHED["tiny-gpt-oss"], recorded.write(folder / "recorded.npz"), TOKENS, folder / "x")
    return folder / "x"


def test_nothing_of_a_prompt_that_is_fed_is_in_the_history(recorded: Trace, planted: Path) -> None:
    history, card = Trace.read(planted / HISTORY), read_card(planted)
    assert [about["prompt"] for about in history.prompts] == [3, 5, 6, 7, 8, 9]  # 4 is a loop, 2 is fed in part
    assert card.prompts == ((0, 20), (20, 40), (40, 50))
    assert np.array_equal(history.experts[:20], recorded.experts[60:80, :3])
    assert np.array_equal(history.experts[20:], recorded.experts[100:, :3])
    assert [history.task_of(n) for n in range(6)] == ["b", "b", "a", "b", "a", "b"]
    check_history(planted, history, "history")


def test_a_prompt_with_the_text_of_a_fed_one_is_left_out(recorded: Trace) -> None:
    texts = np.arange(20, dtype=np.int32)
    texts[14:16] = texts[2:4]  # prompt 7 has the text of prompt 1
    made = replace(recorded, prompt_token_ids=texts, prompt_token_offsets=np.arange(0, 21, 2, dtype=np.int64))
    assert other_prompts(made, TOKENS) == (3, 5, 6, 8, 9)


@pytest.mark.parametrize(("layers", "experts", "k"), [(3, 8, 2), (3, 16, 4), (3, 24, 4), (3, 12, 4), (2, 8, 1)])
def test_both_are_made_of_the_recording_in_the_same_way(recorded: Trace, layers: int, experts: int, k: int) -> None:
    """Whatever a shape's experts are made of: to plant the others alone gives what the history has of them, but for
    which copy of a split expert a prompt uses and which experts were merged by what was planted."""
    shape = replace(PUBLISHED["tiny-qwen3-moe"], layers=layers, experts=experts, top_k=k)
    made, numbers = fit_others(recorded, shape, TOKENS, 0)
    assert numbers == (3, 5, 6, 7, 8, 9)
    assert made.prompts[0] == (0, 20)
    assert made.prompts[-1] == (100, 120)
    alone = fit(recorded.select(numbers), shape, 60, 0)
    assert made.experts.shape[1:] == alone.experts.shape[1:]
    ordered = np.sort(made.experts, axis=2)
    assert (ordered[:, :, 1:] != ordered[:, :, :-1]).all()
    if experts in (8, 16):  # neither split nor merged
        assert np.array_equal(made.experts[:60], alone.experts)


def test_experts_are_merged_as_they_were_when_planted(recorded: Trace) -> None:
    """A history that holds the planted tokens' own routes again has them resampled to the same."""
    shape = replace(PUBLISHED["tiny-qwen3-moe"], layers=3, experts=12, top_k=4)
    twice = recorded.select([0, 1, 2, 3, 0, 1])
    made, numbers = fit_others(twice, shape, 60, 0)
    assert numbers == (3, 4, 5)
    assert np.array_equal(made.experts[20:60], fit(twice, shape, 60, 0).experts[:40])


def test_a_history_can_be_added_later_from_the_same_trace_only(recorded: Trace, planted: Path, tmp_path: Path) -> None:
    before = (planted / HISTORY).read_bytes()
    made = add_history(planted, planted.parent / "recorded.npz")
    assert len(made) == 120
    assert np.array_equal(Trace.read(planted / HISTORY).experts, made.experts)
    other = made_up_trace(200, 5, prompts=10, seed=1).write(tmp_path / "other.npz")
    with pytest.raises(UsageError, match=r"was planted from 'recorded', and .*other.npz gives other routes"):
        add_history(planted, other)
    assert len((planted / HISTORY).read_bytes()) == len(before)


def test_a_trace_without_other_prompts_plants_without_a_history(tmp_path: Path) -> None:
    trace = made_up_trace(60, 5)
    plant(PUBLISHED["tiny-gpt-oss"], trace.write(tmp_path / "t.npz"), 50, tmp_path / "x")
    assert not (tmp_path / "x" / HISTORY).exists()
    with pytest.raises(UsageError, match="no prompts beside those of its first 50 tokens"):
        history_of(trace, PUBLISHED["tiny-gpt-oss"], read_card(tmp_path / "x"))


def test_a_history_that_holds_what_is_fed_is_refused(recorded: Trace, planted: Path, tmp_path: Path) -> None:
    whole = replace(recorded, experts=recorded.experts[:, :3], layers=recorded.layers[:3], weights=None)
    with pytest.raises(UsageError, match=r"leak.npz holds texts that .* is fed"):
        check_history(planted, whole, "leak.npz")
    # The rest of the prompt that was cut is no text that is fed, and the planted routes themselves are.
    with pytest.raises(UsageError, match="holds texts"):
        check_history(planted, Trace.read(planted / ROUTES), "planted")
    path = whole.write(tmp_path / "leak.npz")
    with pytest.raises(UsageError, match="holds texts"):
        profile_of(planted, path, ["next-use"], tmp_path / "out", lambda _: None)


def test_histories_that_teach_nothing_here_are_refused(recorded: Trace, planted: Path, tmp_path: Path) -> None:
    history = str(planted / HISTORY)
    with pytest.raises(UsageError, match="the default learns nothing"), learned(planted, history, (), lambda _: None):
        pass
    with pytest.raises(UsageError, match="lru, least-stale learns nothing"):
        profile_of(planted, history, ["lru", "least-stale"], tmp_path / "out", lambda _: None)
    other = recorded.write(tmp_path / "five-layers.npz")
    with pytest.raises(UsageError, match=r"was routed as .*layers=5.*routes as .*layers=3"):
        profile_of(planted, other, ["next-use"], tmp_path / "out", lambda _: None)
    with learned(planted, None, (), lambda _: None) as profile:
        assert profile is None


def test_what_was_learned_is_a_profile_of_the_checkpoint(recorded: Trace, planted: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with learned(planted, str(planted / HISTORY), ("least-stale", "decayed"), said.append) as folder:
        assert folder is not None
        profile = Profile.read(folder)
        profile.check(profile.fingerprint)
        assert list(profile.predictors) == ["decayed"]
        assert profile.tasks == ()
        assert profile.popularity_of(None).sum(axis=1) == pytest.approx([2.0, 2.0, 2.0])
    assert not Path(folder).exists()
    assert said[0] == "learning decayed from 120 tokens of 6 prompts"
