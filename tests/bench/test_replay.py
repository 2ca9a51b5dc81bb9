"""Replaying a planted checkpoint: real worker processes, and the pieces in this one."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emoe import model as emoe_model
from emoe.bench import decode, limits
from emoe.bench.commands import add_replay, decode_settings
from emoe.bench.engines import Running, generate, load
from emoe.bench.forced import forced, replay
from emoe.bench.limits import link_of, machine_of
from emoe.bench.plant.card import LABEL
from emoe.bench.plant.shapes import PUBLISHED
from emoe.bench.plant.write import plant
from emoe.bench.prompts import planted_ids, prompt_ids
from emoe.bench.report import report_text
from emoe.bench.results import DecodeReport
from emoe.bench.settings import Contender, DecodeSettings, parse_budget
from emoe.checkpoint.memory_room import memory_room
from emoe.config import Prefetch
from emoe.errors import UsageError
from emoe.profiling.kept import fingerprint, keep
from emoe.profiling.machine import Machine
from tests.bench.plant.made_up import made_up_trace

TOKENS = 60


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    plant(PUBLISHED["tiny-gpt-oss"], made_up_trace(TOKENS).write(folder / "made-up.npz"), TOKENS, folder / "x")
    return folder / "x"


@pytest.fixture(scope="module")
def machine() -> Machine:
    """Nothing is measured in tests."""
    return Machine(
        fingerprint(),
        memory_bytes_per_s={1: 1e10},
        disk_direct_bytes_per_s=1e9,
        disk_cached_bytes_per_s=4e9,
        flops={"bfloat16": {1: 1e11}},
    )


@pytest.fixture(scope="module")
def report(planted: Path, machine: Machine) -> DecodeReport:
    settings = DecodeSettings(
        model=str(planted),
        budgets=(parse_budget("100"), parse_budget("30")),
        modes=("exact",),
        baselines=("grouped_mm",),
        prompt_tokens=20,
        new_tokens=9,
        rounds=2,
        threads=1,
        forced=True,
        batch=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "machine_of", lambda *_: machine)
        return decode.run(settings)


@pytest.mark.slow
def test_every_bit_of_the_logits_is_that_of_all_experts_resident(report: DecodeReport) -> None:
    assert report.failed == []
    assert report.inexact == []
    full, exact, plain = report.outcomes
    for number in (0, 1):
        assert exact.samples[number]["checksum"] == full.samples[number]["checksum"]
        # A warm-up of 28 tokens came first; the head prefers the token that follows in the trace.
        first = (28 * (number + 1) + 20) % TOKENS
        wanted = [(first + step) % TOKENS for step in range(9)]
        assert full.samples[number]["tokens"] == plain.samples[number]["tokens"] == wanted
        assert len(full.samples[number]["step_s"]) == 8
    assert full.samples[0]["checksum"] != full.samples[1]["checksum"]


@pytest.mark.slow
def test_what_is_printed_says_what_was_planted_and_how_far_the_limit_is(report: DecodeReport) -> None:
    text = report_text(report)
    assert f"{LABEL} (tiny-gpt-oss, 3 layers; routes of made-up: every route as recorded)" in text
    assert "2 sequences: 20 prompt tokens, then 8 fed one by one, 2 rounds" in text
    assert "of limit: decode" in text
    assert "(memory)" in text
    assert f"checksums of emoe exact 100%'s logits: {report.outcomes[0].samples[0]['checksum']}" in text
    values = json.loads(json.dumps(report.as_dict()))
    assert values["schema"] == "emoe-bench-replay/1"
    assert values["planted"]["shape"] == "tiny-gpt-oss"
    full, exact, plain = values["contenders"]
    assert set(full["roofline"]) == {"decode", "prefill"}
    assert 0 < full["roofline"]["decode"]["share"] < 1
    assert full["roofline"]["decode"]["link_s"] == 0 < exact["roofline"]["decode"]["link_s"]
    assert plain["roofline"] == {}  # does not count what it misses
    assert exact["decode_misses_per_token"] > 0 == full["decode_misses_per_token"]
    sample = full["samples"][0]
    assert full["decode_tokens_per_s"]["max"] >= 2 * 8 / sample["decode_s"]  # of both sequences


def test_a_checksum_that_differs_is_a_defect_though_tokens_agree(report: DecodeReport) -> None:
    exact = report.outcomes[1]
    before = exact.samples[1]["checksum"]
    exact.samples[1]["checksum"] = "another"
    assert report.inexact == ["emoe exact 30%"]
    assert "DEFECT  emoe exact 30%: the logits differ from those of emoe exact 100%" in report_text(report)
    exact.samples[1]["checksum"] = before


def test_forced_steps_give_the_logits_of_one_pass(planted: Path) -> None:
    model, _ = emoe_model.load(planted, expert_memory="50%", dtype="float32")
    ids = torch.tensor([[3, 9, 27, 11, 5, 40]])
    stepped = torch.stack([logits[0] for logits in forced(model, ids, 3)])
    chunked = torch.stack([logits[0] for logits in forced(model, ids, 5, chunk=2)])
    with torch.inference_mode():
        whole = model(ids).logits[0, 2:]
    emoe_model.close(model)
    assert stepped.shape == (4, 64)
    assert torch.allclose(stepped, whole, atol=1e-4)
    assert torch.allclose(chunked, whole[2:], atol=1e-4)


def test_generating_walks_along_the_trace_as_feeding_does(planted: Path) -> None:
    model, _ = emoe_model.load(planted, expert_memory="50%")
    running = Running(model)
    ids = planted_ids(planted, 10, 26)
    fed = replay(running, ids, 20, 0)
    generated = generate(running, ids[0][:20], 7, 0)
    emoe_model.close(model)
    assert fed.tokens == generated.tokens == list(range(30, 37))
    assert fed.batch == 1
    assert len(fed.checksum or "") == 16


def test_sequences_of_a_batch_begin_apart_and_all_begin_anew_after_the_last_token(planted: Path) -> None:
    assert planted_ids(planted, 58, 4) == [[58, 59, 0, 1]]
    assert [row[0] for row in planted_ids(planted, 5, 3, batch=3)] == [5, 25, 45]
    assert prompt_ids(planted, 2, 5) == [10, 11, 12, 13, 14]


def test_mistakes_are_refused(planted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no planted checkpoint"):
        decode.run(DecodeSettings(model=str(tmp_path), forced=True))
    for made in ({"batch": 2}, {"chunk": 5}):
        with pytest.raises(UsageError, match="batches and chunks can be replayed"):
            DecodeSettings(**made)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="chunk must be at least 1, not 0"):
        DecodeSettings(chunk=0, forced=True)
    with pytest.raises(UsageError, match="batch must be at least 1, not 0"):
        DecodeSettings(batch=0, forced=True)


def test_what_does_not_fit_is_not_started(planted: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    room = replace(memory_room(), available_bytes=2**20)
    monkeypatch.setattr(decode, "memory_room", lambda: room)
    monkeypatch.setattr(decode, "machine_of", lambda *_: machine)
    settings = DecodeSettings(
        model=str(planted), budgets=(parse_budget("50"),), modes=("exact",), baselines=(), forced=True
    )
    [failed] = decode.run(settings).failed
    assert "emoe exact 50% needs 3" in (failed.error or "")
    assert "1.00 MiB are free" in (failed.error or "")
    assert not failed.loads


def test_options_reach_the_settings(planted: Path) -> None:
    parser = argparse.ArgumentParser()
    add_replay(parser)
    words = f"{planted} --prefill 9 --decode 4 --batch 3 --chunk 2 --budgets 50 --modes exact --prefetch next-gate "
    words += "--expert-dtype int8"
    found = decode_settings(parser.parse_args(words.split()))
    assert found == DecodeSettings(
        model=str(planted),
        budgets=(parse_budget("50"),),
        modes=("exact",),
        baselines=(),
        prompt_tokens=9,
        new_tokens=5,
        forced=True,
        batch=3,
        chunk=2,
        prefetches=("next-gate",),
        expert_dtype="int8",
    )
    assert found.positions == 13
    assert "100,80,60,40,20" in parser.format_help()


@pytest.mark.parametrize("prefetch", [None, "next-gate"])
def test_a_contender_is_loaded_with_its_prefetching(planted: Path, prefetch: Prefetch | None) -> None:
    contender = Contender("emoe", parse_budget("50"), "exact", prefetch=prefetch)
    running = load(contender, planted, {"reader": "auto"})
    about, counted = emoe_model.stats(running.model)["prefetch"], running.counters()
    running.close()
    assert (about and about["name"]) == prefetch
    assert ("ahead_issued" in counted) == ("ahead_used" in counted) == (prefetch is not None)


def test_rates_that_were_kept_are_not_measured_again(
    planted: Path, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    asked: list[Any] = []

    def measured(files: list[Path], **_: Any) -> Machine:
        asked.append(files)
        return Machine(fingerprint(files), memory_bytes_per_s=machine.memory_bytes_per_s)

    monkeypatch.setattr(limits, "measure", measured)
    said: list[str] = []
    first = machine_of(planted, said.append)
    assert machine_of(planted, said.append) == first
    assert len(asked) == 1
    assert said == ["measuring this machine, about 20 s; kept for the next time"]
    keep(first)


@pytest.mark.parametrize(("storage", "link"), [(0, "cached"), (99, "cached"), (100, "direct")])
def test_misses_come_from_where_most_of_their_bytes_came(storage: int, link: str) -> None:
    assert link_of(storage, 200) == link
