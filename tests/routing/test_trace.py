"""The trace file: round trips, the layouts of others, damage."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.routing.trace import DECODE, PREFILL, Trace, TraceError, id_dtype, missing_id

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "traces"


def random_trace(seed: int, prompts: int = 3, layers: int = 2, num_experts: int = 8, top_k: int = 2) -> Trace:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 6, prompts)
    tokens = int(lengths.sum())
    dtype = id_dtype(num_experts)
    text = rng.integers(0, 4, prompts)
    return Trace(
        experts=rng.integers(0, num_experts, (tokens, layers, top_k)).astype(dtype),
        weights=rng.random((tokens, layers, top_k)).astype(np.float16),
        phase=rng.integers(0, 2, tokens).astype(np.uint8),
        step=rng.permutation(tokens).astype(np.int64),
        token_ids=rng.integers(0, 99, tokens).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        task=rng.integers(-1, 2, prompts).astype(np.int32),
        tasks=("maths", "résumé"),
        prompt_token_ids=rng.integers(0, 99, int(text.sum())).astype(np.int32),
        prompt_token_offsets=np.concatenate([[0], np.cumsum(text)]).astype(np.int64),
        layers=np.arange(3, 3 + layers, dtype=np.int32),
        num_experts=num_experts,
        prompts=tuple({"number": i} for i in range(prompts)),
        source={"model": "tiny"},
    )


ARRAYS = (
    *("experts", "weights", "phase", "step", "token_ids", "offsets", "task", "layers"),
    *("prompt_token_ids", "prompt_token_offsets"),
)


def assert_same(a: Trace, b: Trace) -> None:
    for name in ARRAYS:
        left, right = getattr(a, name), getattr(b, name)
        if left is None or right is None:
            assert left is right, name
        else:
            assert left.dtype == right.dtype, name
            np.testing.assert_array_equal(left, right, err_msg=name)
    for name in ("tasks", "num_experts", "prompts", "source"):
        assert getattr(a, name) == getattr(b, name), name


@given(seed=st.integers(0, 1000), prompts=st.integers(0, 4), num_experts=st.sampled_from([1, 8, 255, 256, 600]))
@settings(max_examples=25)
def test_what_is_written_is_read(tmp_path_factory: Any, seed: int, prompts: int, num_experts: int) -> None:
    path = tmp_path_factory.mktemp("trace") / "run.npz"
    trace = random_trace(seed, prompts, num_experts=num_experts)
    assert trace.write(path) == path
    assert_same(Trace.read(path), trace)
    assert os.listdir(path.parent) == ["run.npz"]


def test_ids_of_255_experts_fit_a_byte_and_of_256_do_not() -> None:
    assert id_dtype(255) == np.uint8
    assert id_dtype(256) == np.uint16
    assert missing_id(id_dtype(256)) == 65535


def test_counts_shares_and_selection() -> None:
    trace = random_trace(4, prompts=4)
    counts = trace.counts()
    for prompt in range(4):
        rows = trace.experts[trace.offsets[prompt] : trace.offsets[prompt + 1]]
        for layer in range(2):
            expected = np.bincount(rows[:, layer].ravel(), minlength=8)
            np.testing.assert_array_equal(counts[prompt, layer], expected)
    np.testing.assert_array_equal(trace.counts(PREFILL) + trace.counts(DECODE), counts)
    np.testing.assert_allclose(trace.shares().sum(axis=1), 2)
    assert {*trace.shares_by_task()} == {"maths", "résumé"}

    chosen = trace.select([2, 0])
    np.testing.assert_array_equal(chosen.counts(), counts[[2, 0]])
    assert [chosen.task_of(0), chosen.task_of(1)] == [trace.task_of(2), trace.task_of(0)]
    assert chosen.prompts == ({"number": 2}, {"number": 0})
    text, ends = trace.prompt_token_ids, trace.prompt_token_offsets
    assert text is not None
    assert ends is not None
    expected_text = [*text[ends[2] : ends[3]], *text[ends[0] : ends[1]]]
    np.testing.assert_array_equal(chosen.prompt_token_ids, expected_text)


def test_entries_not_computed_count_for_nothing() -> None:
    trace = random_trace(1)
    experts = trace.experts.copy()
    experts[:, 1] = missing_id(experts.dtype)
    partial = Trace(**{**vars(trace), "experts": experts})
    assert not partial.computed[:, 1].any()
    assert partial.counts()[:, 1].sum() == 0
    np.testing.assert_array_equal(partial.counts()[:, 0], trace.counts()[:, 0])
    assert partial.shares()[1].sum() == 0


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = random_trace(1).write(tmp_path / "a.npz")
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(TraceError, match=r"a\.npz: the trace could not be written: No space left on device"):
        random_trace(2).write(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.npz"]


# Damage.


def test_a_missing_file_and_no_file_of_ours(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="there is no trace at"):
        Trace.read(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not a zip")
    with pytest.raises(TraceError, match=r"text\.npz is no \.npz file; give a trace that emoe wrote$"):
        Trace.read(tmp_path / "text.npz")
    (tmp_path / "cut.npz").write_bytes(b"PK")
    with pytest.raises(TraceError, match="is not a readable trace"):
        Trace.read(tmp_path / "cut.npz")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(TraceError, match="holds a single array"):
        Trace.read(tmp_path / "single.npy")
    np.savez(tmp_path / "other.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(TraceError, match="no trace that emoe knows; it holds a, b"):
        Trace.read(tmp_path / "other.npz")
    np.savez(tmp_path / "counts.npz", counts=np.zeros((2, 2, 8)), n_tokens=np.zeros(2))
    with pytest.raises(TraceError, match="counts for each prompt, without the order of tokens"):
        Trace.read(tmp_path / "counts.npz")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", header=np.array([{"format": "emoe-trace"}], dtype=object))
    with pytest.raises(TraceError, match="is not a readable trace"):
        Trace.read(tmp_path / "a.npz")


@settings(max_examples=60)
@given(cut=st.floats(0, 0.999), flip=st.integers(0, 10**6))
def test_truncated_or_altered_files_never_pass_for_another_trace(tmp_path_factory: Any, cut: float, flip: int) -> None:
    folder = tmp_path_factory.mktemp("damage")
    trace = random_trace(3)
    data = trace.write(folder / "a.npz").read_bytes()
    (folder / "short.npz").write_bytes(data[: int(cut * len(data))])
    with pytest.raises(TraceError):
        Trace.read(folder / "short.npz")
    altered = bytearray(data)
    altered[flip % len(data)] ^= 0x55
    (folder / "altered.npz").write_bytes(bytes(altered))
    try:
        read = Trace.read(folder / "altered.npz")
    except TraceError:
        return
    assert_same(read, trace)  # the byte was one that nothing reads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": np.array([0, 99])}, "offsets must rise from 0 to"),
        ({"offsets": np.array(3)}, "offsets is int64"),
        ({"experts": np.full((1, 2, 2), 8, np.uint8), "offsets": np.array([0, 1, 1, 1])}, "does not fit"),
        ({"experts": np.zeros((3, 2), np.uint8)}, r"experts is uint8 \[3, 2\]"),
        ({"experts": np.zeros((3, 2, 2), np.float32)}, "experts is float32"),
        ({"phase": np.array(["a"])}, "phase is <U1"),
        ({"layers": np.arange(5)}, r"layers is int64 \[5\] for 2 layers"),
        ({"task": np.array([0, 0, 2])}, "task holds an index outside the 2 task labels"),
        ({"weights": np.zeros((1, 1, 1))}, "weights is float64"),
        ({"prompt_token_ids": None}, "belong together"),
        ({"phase": np.zeros(1, np.uint8)}, "phase is uint8 .* tokens, which does not fit"),
        ({"step": np.zeros(1, np.int64)}, "step is int64 .* tokens, which does not fit"),
        ({"token_ids": np.zeros(1, np.int32)}, "token_ids is int32 .* tokens, which does not fit"),
        ({"weights": np.zeros((1, 1, 1), np.float16)}, "weights is float16"),
        ({"task": np.zeros(2, np.int32)}, r"task is int32 \[2\] for 3 prompts"),
        ({"task": np.array([0, -2, 0])}, "task holds an index outside"),
        ({"prompt_token_offsets": np.array([0, 4])}, r"prompt_token_offsets is int64 \[2\] for 3 prompts"),
        ({"prompt_token_offsets": np.array([0, 1, 1, 2])}, "prompt_token_offsets must rise from 0 to 3"),
        ({"prompt_token_offsets": np.array([0, 2, 1, 3])}, "prompt_token_offsets must rise from 0 to 3"),
        ({"prompt_token_offsets": np.array([1, 2, 2, 3])}, "prompt_token_offsets must rise from 0 to 3"),
        ({"prompts": ()}, "0 prompts are described, but offsets speak of 3"),
        ({"prompts": ({}, {}, "text")}, "3 prompts are described"),
        ({"num_experts": 1}, "experts holds the id 7, but there are 1 experts"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        Trace(**{**vars(random_trace(3)), **change})


def rewritten(path: Path, header: Any, drop: str = "") -> None:
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files if name != drop}
    arrays["header"] = np.frombuffer(header if isinstance(header, bytes) else json.dumps(header).encode(), np.uint8)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("header", "drop", "message"),
    [
        (b"{", "", "header is not JSON"),
        ({"format": "other"}, "", "does not say 'emoe-trace'"),
        ({"format": "emoe-trace", "version": 2}, "", "of version 2; this emoe reads 1: update emoe"),
        ({"format": "emoe-trace", "version": 1}, "", "header is incomplete"),
        ({"format": "emoe-trace", "version": 1}, "step", "lacks the arrays step"),
        (
            {
                "format": "emoe-trace",
                "version": 1,
                "num_experts": 2,
                "tasks": ["a", "b"],
                "prompts": [{}, {}, {}],
                "source": {},
            },
            "",
            r"a\.npz: experts holds the id 7, but there are 2 experts; the file is damaged",
        ),
    ],
)
def test_bad_headers_are_named(tmp_path: Path, header: Any, drop: str, message: str) -> None:
    path = random_trace(3).write(tmp_path / "a.npz")
    rewritten(path, header, drop)
    with pytest.raises(TraceError, match=message):
        Trace.read(path)


# Layouts of others.


def generated_layout(folder: Path) -> None:
    """Two prompts of 2 and 3 tokens; 2 and 1 routed tokens, the last generated one of each not routed."""
    np.savez(
        folder / "trace.npz",
        experts=np.arange(12, dtype=np.uint8).reshape(3, 2, 2),
        weights_u8=np.full((3, 2, 2), 51, dtype=np.uint8),
        offsets=np.array([0, 2, 3]),
        token_ids=np.array([10, 11, 12, 13, 14, 20, 21, 22, 23, 24], dtype=np.int32),
        token_offsets=np.array([0, 5, 10]),
    )
    lines = [{"domain": "maths", "n_prompt_tokens": 2, "dataset": "d"}, {"domain": "code", "n_prompt_tokens": 3}]
    with gzip.open(folder / "prompts.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, lines)))


def test_generated_tokens_of_many_prompts(tmp_path: Path) -> None:
    generated_layout(tmp_path)
    trace = Trace.read(tmp_path)
    assert_same(Trace.read(tmp_path / "trace.npz"), trace)
    assert trace.num_experts == 12
    assert trace.tasks == ("maths", "code")
    assert trace.prompts[0]["dataset"] == "d"
    np.testing.assert_array_equal(trace.experts, np.arange(12).reshape(3, 2, 2))
    np.testing.assert_array_equal(trace.token_ids, [12, 13, 23])
    np.testing.assert_array_equal(trace.prompt_token_ids, [10, 11, 20, 21, 22])
    np.testing.assert_array_equal(trace.prompt_token_offsets, [0, 2, 5])
    np.testing.assert_array_equal(trace.phase, [DECODE] * 3)
    np.testing.assert_array_equal(trace.in_time(), [0, 1, 2])
    assert trace.weights is not None
    np.testing.assert_allclose(trace.weights, 0.2, rtol=1e-3)
    assert Trace.read(tmp_path, num_experts=32).counts().shape == (2, 2, 32)
    trace.write(tmp_path / "ours.npz")
    assert_same(Trace.read(tmp_path / "ours.npz"), trace)


def test_generated_tokens_without_descriptions(tmp_path: Path) -> None:
    generated_layout(tmp_path)
    (tmp_path / "prompts.jsonl.gz").unlink()
    trace = Trace.read(tmp_path)
    assert trace.tasks == ()
    assert trace.token_ids is None
    np.testing.assert_array_equal(trace.task, [-1, -1])


def test_damage_in_the_layouts_of_others(tmp_path: Path) -> None:
    generated_layout(tmp_path)
    with pytest.raises(TraceError, match=r"trace\.npz: experts holds the id 11, but there are 4 experts"):
        Trace.read(tmp_path, num_experts=4)
    packed = (tmp_path / "prompts.jsonl.gz").read_bytes()
    (tmp_path / "prompts.jsonl.gz").write_bytes(packed[:-9])
    with pytest.raises(TraceError, match=r"prompts\.jsonl\.gz cannot be read as JSON lines"):
        Trace.read(tmp_path)
    (tmp_path / "prompts.jsonl.gz").unlink()
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    with pytest.raises(TraceError, match="describes 1 prompts, the trace beside it holds 2"):
        Trace.read(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"n_prompt_tokens": 2}\n{"n_prompt_tokens": 9}\n')
    with pytest.raises(TraceError, match="fewer tokens than were routed"):
        Trace.read(tmp_path)


def test_one_prompt_with_entries_not_computed(tmp_path: Path) -> None:
    selected = np.array([[[0, 127], [255, 255]], [[5, 6], [7, 8]]], dtype=np.uint8)
    weights = np.full((2, 2, 2), 0.5, dtype=np.float16)
    np.savez(tmp_path / "trace.npz", sel=selected, weights=weights, phase=np.array([0, 1], np.uint8))
    trace = Trace.read(tmp_path / "trace.npz")
    assert trace.num_experts == 128
    assert trace.num_prompts == 1
    np.testing.assert_array_equal(trace.computed[0], [[True, True], [False, False]])
    np.testing.assert_array_equal(trace.phase, [PREFILL, DECODE])
    wide = Trace.read(tmp_path / "trace.npz", num_experts=256)
    assert wide.experts.dtype == np.uint16
    np.testing.assert_array_equal(wide.counts(), np.pad(trace.counts(), [(0, 0), (0, 0), (0, 128)]))


def test_zip_members_stay_plain_arrays(tmp_path: Path) -> None:
    """Anyone can read a trace with numpy alone, without this package and without pickles."""
    path = random_trace(3).write(tmp_path / "a.npz")
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            np.lib.format.read_magic(io.BytesIO(archive.read(name)))
    with np.load(path, allow_pickle=False) as arrays:
        assert json.loads(arrays["header"].tobytes())["format"] == "emoe-trace"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the recorded traces of large models are not here")
def test_recorded_traces_of_large_models() -> None:
    trace = Trace.read(SHARED / "gpt-oss-20b")
    assert (len(trace), trace.num_prompts, len(trace.layers), trace.num_experts, trace.top_k) == (
        *(121641, 403, 24, 32, 4),
    )
    assert len(trace.tasks) == 12
    assert trace.token_ids is not None
    np.testing.assert_allclose(trace.shares().sum(axis=1), 4)
    one = Trace.read(SHARED / "qwen3-30b-a3b")
    assert (len(one), len(one.layers), one.top_k) == (156, 48, 6)
    assert 0.99 < one.computed.mean() < 1
