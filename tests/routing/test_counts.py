"""Counts per prompt: read, checked, freed of what prompts share, and turned into tokens that add up to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.routing.counts import PromptCounts, holds_counts, read_counts
from emoe.routing.trace import TraceError

COUNTS = np.array([[[3, 1, 0], [2, 2, 0]], [[2, 0, 2], [0, 2, 2]], [[1, 1, 0], [0, 1, 1]]])
ARRAYS: dict[str, Any] = {
    "counts": COUNTS.astype(np.uint16),
    "n_tokens": np.array([4, 4, 2]),
    "subject": np.array([0, 0, 1]),
    "subjects": np.array(["algebra", "law"]),
}


def write(folder: Path, **changes: Any) -> Path:
    arrays = {name: array for name, array in (ARRAYS | changes).items() if array is not None}
    np.savez(folder / "counts.npz", **arrays)
    return folder


def test_a_folder_or_its_file_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    for path in (tmp_path, tmp_path / "counts.npz"):
        assert holds_counts(path)
        found = read_counts(path)
        assert np.array_equal(found.counts, COUNTS)
        assert (found.top_k, found.tasks, found.num_prompts) == (1, ("algebra", "law"), 3)
        assert [found.task_of(i) for i in range(3)] == ["algebra", "algebra", "law"]
    assert not holds_counts(tmp_path / "nothing.npz")
    (tmp_path / "empty").mkdir()
    assert not holds_counts(tmp_path / "empty")
    (tmp_path / "trace.npz").write_bytes(b"no archive")
    assert not holds_counts(tmp_path), "a trace lies beside it"
    assert not holds_counts(tmp_path / "trace.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_tokens": None}, "lacks n_tokens"),
        ({"n_tokens": np.array([4, 4, 3])}, "do not add up to n_tokens x 1"),
        ({"n_tokens": np.array([4, 4])}, "do not fit"),
        ({"counts": COUNTS.astype(float)}, "do not fit"),
        ({"counts": COUNTS[:, 0]}, "do not fit"),
        ({"subject": np.array([0, 0, 2])}, "does not name one of 2 subjects"),
        ({"subjects": None}, "does not name one of 0 subjects"),
        ({"subject": np.array([0, 1])}, "does not name one of 2 subjects for 3 prompts"),
        ({"subject": np.array([0, -2, 1])}, "does not name one of 2 subjects"),
        ({"counts": COUNTS[:0], "n_tokens": np.zeros(0, int), "subject": np.zeros(0, int)}, "do not add up"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message) as error:
        read_counts(write(tmp_path, **changes))
    assert "counts.npz" in str(error.value)


def test_labels_may_be_absent(tmp_path: Path) -> None:
    found = read_counts(write(tmp_path, subject=None, subjects=None))
    assert found.task_of(0) is None
    assert np.array_equal(found.without_prefix().counts, COUNTS), "nothing is known to be shared"


def test_what_all_prompts_of_a_label_share_is_subtracted() -> None:
    counts = PromptCounts(COUNTS, np.array([0, 0, 1]), ("algebra", "law"), 1).without_prefix()
    assert counts.counts[:2].tolist() == [[[1, 1, 0], [2, 0, 0]], [[0, 0, 2], [0, 0, 2]]]
    assert not counts.counts[2].any(), "a single prompt shares all it has with itself"
    assert counts.without_tasks().task_of(0) is None
    assert counts.without_tasks().as_trace().task_of(0) is None
    assert np.array_equal(counts.select([1, 0]).counts, counts.counts[[1, 0]])


@given(
    st.integers(1, 3).flatmap(
        lambda k: st.tuples(
            st.just(k), st.lists(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=2, max_size=2))
        )
    )
)
def test_the_tokens_made_up_add_up_to_the_counts(case: tuple[int, list[Any]]) -> None:
    top_k, rows = case
    counts = np.array(rows, dtype=np.int64).reshape(-1, 2, 4)
    trace = PromptCounts(counts, np.full(len(counts), -1), (), top_k).as_trace(seed=3)
    assert np.array_equal(trace.counts(), counts)
    assert trace.top_k == top_k and trace.num_experts == 4
    least = [max(-(-each.sum(axis=1).max() // top_k), each.max()) for each in counts]
    assert np.diff(trace.offsets).tolist() == least, "a prompt has no more tokens than its counts need"
    for token in trace.experts.tolist():
        for layer in token:
            named = [expert for expert in layer if expert != 255]
            assert len(named) == len(set(named)), "no token names an expert twice"


@given(st.integers(1, 3), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 999))
def test_counts_of_whole_routes_are_read_back(tmp_path_factory: Any, top_k: int, lengths: list[int], seed: int) -> None:
    """However many tokens each prompt has; a file in which nobody has any says nothing."""
    rng = np.random.default_rng(seed)
    routes = [np.argsort(rng.random((length, 2, 4)), axis=2)[:, :, :top_k] for length in lengths]
    counts = np.array([[np.bincount(one[:, layer].ravel(), minlength=4) for layer in range(2)] for one in routes])
    path = write(tmp_path_factory.mktemp("counts"), counts=counts, n_tokens=np.array(lengths), subject=None)
    if not any(lengths):
        with pytest.raises(TraceError, match="do not add up"):
            read_counts(path)
        return
    found = read_counts(path)
    assert found.top_k == top_k and np.array_equal(found.counts, counts)
