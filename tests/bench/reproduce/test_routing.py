"""Verdicts of the experiments on routes follow the numbers, at the thresholds their methods state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emoe.bench.reproduce.experiments import fig3, fig7, fig8, fig9, table1, table2
from emoe.prediction.scoring import SIMPLE, Row, network_name


@pytest.mark.parametrize(("times", "verdict"), [(1.6, "holds"), (1.2, "partly"), (1.05, "does not hold")])
def test_transitions_are_strong_by_how_much_more_they_name(times: float, verdict: str) -> None:
    claim = fig3._claim("m", np.array([0.2 * times, 0.2, 0.1, 0.2, 0.22, 0.5, 0.0, 4.0]))
    assert claim.verdict == verdict and f"{times:.1f}x" in claim.here


@pytest.mark.parametrize(
    ("r", "other", "verdict"),
    [(0.46, 0.1, "holds"), (0.3, 0.1, "partly"), (0.9, 0.85, "partly"), (0.15, 0.1, "does not hold")],
)
def test_layers_are_alike_by_r_and_beside_other_prompts(r: float, other: float, verdict: str) -> None:
    curves = {fig7.PROMPT: [r, r], fig7.OTHER_PROMPT: [other, other], fig7.NUMBERED: [0.0], fig7.PROMPT_C: [0.9]}
    claim = fig7._claim("m", {**curves, fig7.NOTHING_C: [0.95]})
    assert claim.verdict == verdict and "of a token" not in claim.here


@pytest.mark.parametrize(
    ("mixed", "same", "verdict"), [(0.4, 0.5, "holds"), (0.1, 0.5, "partly"), (0.1, 0.2, "does not hold")]
)
def test_neighbours_are_alike_with_tasks_mixed_or_within_one(mixed: float, same: float, verdict: str) -> None:
    values = {"same task": same, "mixed tasks": mixed, "popularity alone": 0.3, "no preference": 0.0}
    curves = {(measure, name): np.full((3, 2), r) for measure in ("r", "c") for name, r in values.items()}
    curves["r", fig8.SPECIAL[1]] = np.zeros((3, 2))
    assert fig8._claim("m", curves).verdict == verdict


@pytest.mark.parametrize(
    ("first", "last", "reach", "verdict"),
    [
        (0.5, 0.46, 20, "holds"),
        (0.2, 0.15, 20, "partly"),
        (0.6, 0.45, 20, "does not hold"),
        (0.5, 0.5, 9, "not measured"),
    ],
)
def test_distance_changes_nothing_and_r_is_high(first: float, last: float, reach: int, verdict: str) -> None:
    values = {d: (r, 0.9) for d, r in enumerate(np.linspace(first, last, reach), start=1)}
    claim = fig9._claim("m", dict.fromkeys(fig9.CURVES, values))
    assert claim.verdict == verdict


def test_the_papers_tasks_are_counted() -> None:
    assert table1._claim((*table1.PAPER, "code")).verdict == "holds"
    assert table1._claim(("qa",)).verdict == "partly"
    assert table1._claim(("chess",)).verdict == "not measured"


def _rows(**accuracy: float) -> dict[str, Row]:
    names = {name: 0.4 for name in SIMPLE} | {
        network_name(model, kind): accuracy[f"{model}_{kind}"] for model in table2.MODELS for kind in table2.KINDS
    }
    figures: dict[str, Any] = dict.fromkeys(table2.FIGURES, 0.0)
    return {name: Row(name, "boundary", {**figures, "accuracy": value}, figures) for name, value in names.items()}


def test_networks_are_judged_by_level_kind_and_order() -> None:
    paper = _rows(xlnet_l=0.7, xlnet_a=0.69, gpt2_l=0.5, gpt2_a=0.49, bert_l=0.13, bert_a=0.12)
    assert [claim.verdict for claim in table2._claims("m", paper, table2.MODELS)] == ["holds"] * 3
    alike = _rows(xlnet_l=0.5, xlnet_a=0.58, gpt2_l=0.5, gpt2_a=0.57, bert_l=0.5, bert_a=0.56)
    assert [claim.verdict for claim in table2._claims("m", alike, table2.MODELS)] == ["does not hold"] * 3
    assert len(table2._claims("m", alike, table2.MODELS[:1])) == 2
    close = _rows(xlnet_l=0.7, xlnet_a=0.7, gpt2_l=0.65, gpt2_a=0.65, bert_l=0.6, bert_a=0.6)
    assert table2._claims("m", close, table2.MODELS)[2].verdict == "partly"
