"""Medians, ratios, and the comparison of texts, on made-up samples."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from emoe.bench.plant.card import PlantCard
from emoe.bench.report import report_text
from emoe.bench.results import SCHEMA, DecodeReport, Outcome, decode_rate
from emoe.bench.settings import DecodeSettings, parse_budget


def sample(seconds: float, tokens: list[int], hits: int = 0, misses: int = 0) -> dict[str, Any]:
    counted = {"hits": hits, "misses": misses, "bytes_read": 2**20 * misses, "load_wait_s": 0.1} if hits else {}
    return {
        "tokens": tokens,
        "first_token_s": 2 * seconds,
        "decode_s": seconds,
        "first_token_cpu_s": seconds,
        "decode_cpu_s": seconds,
        "peak_bytes": 10 * 2**20,
        "storage_bytes": 0,
        "prefill": counted,
        "decode": counted,
        "step_s": [],
    }


def loaded(note: str) -> dict[str, Any]:
    return {"load_s": 1.0, "load_peak_bytes": 2**20, "notes": [note], "versions": {"torch": "9"}, "threads": 2}


def a_report(**settings: Any) -> DecodeReport:
    asked = DecodeSettings(
        budgets=(parse_budget("100"), parse_budget("40")), baselines=("eager", "grouped_mm"), rounds=3, **settings
    )
    outcomes = [Outcome(contender, plan_bytes=11 * 2**20) for contender in asked.contenders]
    full, exact, resident, eager, grouped = outcomes
    text = [1, 2, 3, 4, 5]
    for number, drift in enumerate((1.0, 4.0, 2.0)):  # the whole machine is slower in some rounds
        full.samples[number] = sample(1.0 * drift, text, hits=10)
        exact.samples[number] = sample(2.0 * drift, text, hits=8, misses=2)
        resident.samples[number] = sample(1.0 * drift, [1, 2, 3, 4, 6 - number], hits=8, misses=2)
        eager.samples[number] = sample(4.0 * drift, text)
    for outcome in outcomes:
        outcome.loads.append(loaded("reads go somewhere: 3 of 10.5 GiB"))
    grouped.error = "transformers grouped_mm died with exit code 1"
    machine = {"cpu": "Abacus", "cpus": 2, "memory_bytes": 2**34, "system": "Linux 9"}
    model = {"name": "m", "description": "d"}
    return DecodeReport(asked, model, machine, True, outcomes, {"torch": "9"}, [2])


def test_ratios_are_taken_round_by_round_so_drift_cancels() -> None:
    report = a_report()
    baseline = report.baseline(decode_rate)
    assert baseline is not None
    assert baseline.name == "transformers eager"
    ratio = report.ratio(report.outcomes[1], lambda s: 1 / float(s["decode_s"]))
    assert ratio is not None
    assert (ratio.median, ratio.least, ratio.greatest) == (2.0, 2.0, 2.0)
    rates = report.outcomes[0].decode_tokens_per_s
    assert rates is not None
    assert (rates.median, rates.least, rates.greatest) == (2.0, 1.0, 4.0)


def test_the_baseline_can_be_chosen() -> None:
    report = a_report(baseline="emoe exact 100%")
    assert report.as_dict()["contenders"][1]["decode_ratio"]["median"] == 0.5


def test_decoding_and_prefill_each_have_the_fastest_as_their_baseline() -> None:
    report = a_report()
    report.outcomes[4].error = None
    for number, one in report.outcomes[3].samples.items():  # twice as fast at decoding, far slower to start
        report.outcomes[4].samples[number] = one | {"decode_s": one["decode_s"] / 2, "first_token_s": 100.0}
    found = report.as_dict()
    assert found["decode_baseline"] == "transformers grouped_mm"
    assert found["prefill_baseline"] == "transformers eager"
    assert "against transformers grouped_mm (decode), transformers eager (prefill)" in report_text(report)


def test_texts_are_held_against_exact_with_the_most_experts() -> None:
    report = a_report()
    assert [report.identical_rounds(outcome) for outcome in report.outcomes] == [3, 3, 1, 3, None]
    assert report.inexact == []
    report.outcomes[1].samples[2]["tokens"] = [9]
    assert report.inexact == ["emoe exact 40%"]
    assert "DEFECT  emoe exact 40%: the text differs from that of emoe exact 100%" in report_text(report)


def test_hit_rates_and_bytes_are_those_of_decoding() -> None:
    exact = a_report().as_dict()["contenders"][1]
    assert exact["decode_hit_rate"] == 0.8
    assert exact["decode_bytes_read_per_token"] == 2 * 2**20 / 4
    assert a_report().as_dict()["contenders"][3]["decode_hit_rate"] is None


def test_json_holds_everything_the_text_says() -> None:
    found = json.loads(json.dumps(a_report().as_dict()))
    assert found["schema"] == SCHEMA
    assert found["threads"] == [2]
    assert [c["rounds"] for c in found["contenders"]] == [3, 3, 3, 3, 0]
    assert found["contenders"][4]["error"] == "transformers grouped_mm died with exit code 1"
    assert found["contenders"][4]["decode_tokens_per_s"] is None
    assert found["contenders"][0]["samples"][0]["round"] == 0


def test_the_text_is_a_table_with_its_conditions() -> None:
    text = report_text(a_report(cold=True, memory_limit=2**30))
    assert "Abacus, 2 CPUs, 16.00 GiB; 2 threads; torch 9" in text
    assert "each in a memory cgroup of 1.00 GiB, page cache dropped before every generation" in text
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "80.0%" in rows["emoe exact 40%"]
    assert rows["emoe exact 40%"].endswith("3/3")
    assert "FAILED  transformers grouped_mm died with exit code 1" in text
    # Five contenders said the same but for numbers: one line.
    assert text.count("reads go somewhere") == 1


def test_what_was_loaded_ahead_is_said() -> None:
    report = a_report()
    exact = report.outcomes[1]
    for one in exact.samples.values():  # a plan's: issued while the prompt is read, used later
        one["prefill"] = one["prefill"] | {"ahead_issued": 5, "ahead_used": 0}
        one["decode"] = one["decode"] | {"ahead_issued": 1, "ahead_used": 5}
    assert "emoe exact 40%: 6 loads ahead a round, 83% used" in report_text(report)
    for one in exact.samples.values():
        one["prefill"] |= {"ahead_issued": 0, "ahead_used": 0}
        one["decode"] |= {"ahead_issued": 0, "ahead_used": 0}
    assert "emoe exact 40%: nothing was loaded ahead" in report_text(report)


def test_what_the_next_router_guesses_on_a_planted_checkpoint_is_said() -> None:
    card = PlantCard(
        shape="tiny", model="", layers=2, experts=8, top_k=2, trace="t", tokens=9, seed=0, dtype="bfloat16",
        resampled=False, kept="every route as recorded", prompts=((0, 9),), vocabulary=64, next_gate=0.7912,
    )  # fmt: skip
    report = replace(a_report(), settings=DecodeSettings(modes=("exact",), prefetches=("next-gate",)))
    said = "next-gate loads ahead what the next layer's router would choose"
    assert f"{said}, page cache" in report_text(report)  # a trained model: nobody knows
    report.planted = card.as_dict()
    assert f"{said} (it is right about 79.1% of a token's experts, as planted)" in report_text(report)
    del report.planted["next_gate"]  # as older cards
    assert f"{said} (it is right every time, as planted: more than any trained model's is)" in report_text(report)
