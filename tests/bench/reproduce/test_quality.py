"""Judging: a mode that loses nothing loses nothing, cells are shared, and verdicts follow the numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe import nano
from emoe.bench.reproduce import accuracy, judging
from emoe.bench.reproduce.accuracy import Accuracy, Gap, Judged, Similar, gap
from emoe.bench.reproduce.asked import Settings
from emoe.bench.reproduce.experiments import fig5, fig10, fig13, fig15
from emoe.bench.reproduce.findings import read_finding, write_finding
from emoe.bench.reproduce.judging import AGNOSTIC, FULL, OURS, Texts, Way, judged, similar
from emoe.bench.reproduce.rivals import ByScore, Random, rivals
from emoe.bench.reproduce.workbench import Workbench
from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.prediction.registry import PREDICTORS
from emoe.tasks.profile import Profile
from emoe.tasks.sensitivity import Sensitivity

pytestmark = pytest.mark.filterwarnings("ignore:.*requires_grad.*")
TEXTS = Texts(per_task=1, tokens=4)
TASKS = ("qa", "code")


def _bench(out: Path) -> Workbench:
    """Two tasks of emoe-nano's prompts, two prompts a side, answers of four tokens; the shipped profile."""
    lines = [row for task in TASKS for row in [row for row in nano.prompts() if row["task"] == task][:4]]
    prompts = out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in lines))
    bench = Workbench(
        Settings(out / "out", quick=True, prompts=prompts, prompt_tokens=32, new_tokens=4),
        lambda *_: None,
        lambda _: None,
    )
    bench.__dict__["profile"] = Profile.read(nano.profile_path(), bench.fingerprint)
    return bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A workbench whose recorded answers are made once."""
    return _bench(tmp_path_factory.mktemp("quality"))


def test_exact_loses_nothing_and_lossy_modes_are_compared_with_it(bench: Workbench) -> None:
    full, exact, lossy, agnostic = judged(
        bench,
        [
            (TEXTS, FULL, None),
            (TEXTS, Way(mode="exact"), "40%"),
            (TEXTS, OURS, "20%"),
            (TEXTS, AGNOSTIC, "20%"),
        ],
    )
    assert full.agreement() == exact.agreement() == 100.0
    assert exact.nll == full.nll and exact.perplexity() == full.perplexity()
    assert sorted(full.tasks) == sorted(TASKS) and all(0 < count <= 4 for count in full.tokens)
    for one in (lossy, agnostic):
        assert one.stats["plans"] == 1 and one.stats["rerouted_share"] > 0 and sum(one.nll) != sum(full.nll)
    by_task = [(full.perplexity(task) or 0.0, n) for task, n in zip(full.tasks, full.tokens, strict=True)]
    assert math.log(full.perplexity() or 0) == pytest.approx(
        sum(n * math.log(value) for value, n in by_task) / sum(full.tokens)
    )


def test_what_was_judged_is_not_judged_again(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = judged(bench, [(TEXTS, FULL, None)])
    monkeypatch.setattr(judging, "judge", None)
    assert judged(bench, [(TEXTS, FULL, None)]) == first


def test_a_way_that_cannot_run_is_a_note_and_no_number(bench: Workbench) -> None:
    (refused,) = judged(bench, [(TEXTS, OURS, 1000)])
    assert refused.agreement() is None and refused.perplexity() is None and refused.refused
    assert refused.refused in accuracy.notes(bench, [refused])[-1]


def test_whole_answers_are_compared_where_the_encoder_is_there(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Encoder:
        def similarities(self, text: str, others: list[str]) -> list[float]:
            return [float(text == other) for other in others]

    for module in (judging, accuracy):
        monkeypatch.setattr(module, "encoder_folder", lambda: Path("here"))
    monkeypatch.setattr("emoe.profiling.similarity.SentenceEncoder", Encoder)
    (full,) = similar(bench, [(TEXTS, FULL, "60%")])
    assert full.values == [100.0, 100.0] and full.mean("qa") == 100.0
    for module in (judging, accuracy):
        monkeypatch.setattr(module, "encoder_folder", lambda: None)
    (none,) = similar(bench, [(TEXTS, FULL, "60%")])
    assert none.mean() is None and any("not measured" in note for note in accuracy.notes(bench))


def test_texts_keep_their_order_by_seed_or_by_task(bench: Workbench) -> None:
    texts = judging.items(bench, Texts("references", per_task=2, tokens=3))
    assert texts == judging.items(bench, Texts("references", per_task=2, tokens=3))
    blocks = [item.task for item in judging.items(bench, Texts("references", 2, 3, "blocks"))]
    assert blocks == ["qa", "qa", "code", "code"] and all(1 <= len(item.text) <= 3 for item in texts)


def test_no_references_are_refused(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = [dataclasses.replace(prompt, reference=None) for prompt in bench.prompts["score"]]
    monkeypatch.setitem(bench.prompts, "score", bare)
    with pytest.raises(UsageError, match="reference"):
        judging.items(bench, Texts("references"))


def test_a_scorer_as_predictor_ranks_each_layer() -> None:
    class Scorer:
        name = "scorer"

        def scores(self) -> Any:
            return np.array([[-3.0, -1.0, -2.0]])

    scorer: Any = Scorer()
    shares = ByScore(RoutingShape(1, 3, 2), scorer).predict(None)
    assert shares.argsort(axis=1).tolist() == [[0, 2, 1]]
    assert shares.sum() == pytest.approx(2)


def test_rivals_are_predictors_only_inside_the_block() -> None:
    before = dict(PREDICTORS)
    with pytest.raises(ZeroDivisionError), rivals(seed=3):
        one, two = (PREDICTORS["random"](RoutingShape(2, 4, 2)).predict(None) for _ in range(2))
        assert np.array_equal(one, two) and not np.array_equal(one, Random(RoutingShape(2, 4, 2)).predict(None))
        assert PREDICTORS["next-use"](RoutingShape(2, 4, 2)).name == "next-use"
        raise ZeroDivisionError
    assert before == PREDICTORS


def _judged(nll: float) -> Judged:
    return Judged(["qa"], [1], [1], [nll], {"plans": 1})


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((8.0, 8.1, 8.2, 9.5, 10.0), "holds"),
        ((8.0, 8.1, 8.9, 9.5, 10.0), "partly"),
        ((8.0, 8.1, 8.1, 8.2, 8.2), "partly"),
        ((8.0, 11.0, 11.0, 10.5, 12.0), "does not hold"),
    ],
)
def test_flat_to_forty_and_rising_is_what_holds(values: tuple[float, ...], verdict: str) -> None:
    by = {("shuffled", fig10.OWN, p): _judged(math.log(v)) for p, v in zip(fig10.PAPER_P, values, strict=True)}
    assert fig10._claim(by, "shuffled", "tasks shuffled", fig10.PAPER_P, "why").verdict == verdict


@pytest.mark.parametrize(
    ("random", "verdict"), [((60.0, 70.0), "holds"), ((63.0, 70.0), "partly"), ((70.0, 80.0), "does not hold")]
)
def test_beating_random_by_the_papers_points_is_what_holds(random: tuple[float, float], verdict: str) -> None:
    found = {}
    for share, ours, other in ((40, 65.0, random[0]), (60, 75.0, random[1])):
        for name, value in (("ours, p = 40", ours), ("random, p = 40", other)):
            tasks = ["qa"] * accuracy.LEAST_PROMPTS
            found[share, name] = Accuracy(
                Judged(tasks, [1] * len(tasks), [1] * len(tasks), [0.0] * len(tasks), {}),
                Similar(tasks, [value] * len(tasks)),
            )
    assert fig15._random(found, (40, 60), 40, "why").verdict == verdict


def _similar(*values: float, task: str = "qa") -> Accuracy:
    tasks = [task] * len(values)
    ones = [1] * len(values)
    return Accuracy(Judged(tasks, ones, ones, [0.0] * len(values), {}), Similar(tasks, list(values)))


def test_a_difference_that_prompts_do_not_tell_is_undecided() -> None:
    unclear = gap(_similar(90, 0, 90, 0, 90, 0), _similar(0, 80, 0, 80, 0, 80))
    clear = gap(_similar(90, 80, 90, 80, 90, 80), _similar(80, 75, 80, 75, 80, 75))
    assert unclear is not None and clear is not None
    assert unclear.points == pytest.approx(5) and not unclear.tells and unclear.low < 0 < unclear.high
    assert clear.points == pytest.approx(7.5) and clear.better and clear.tells and 5 <= clear.low <= clear.high <= 10
    refused = Accuracy(Judged([], [], [], [], {}, "too small"), Similar([], None))
    assert gap(refused, _similar(1, 2, 3, 4)) is None and refused.value() is None
    found = {
        (60, "ours, p = 1"): _similar(90, 0, 90, 0, 90, 0),
        (60, "random, p = 1"): _similar(0, 80, 0, 80, 0, 80),
    }
    assert fig15._random(found, (60,), 1, "why").verdict == "undecided"


def test_a_loss_that_prompts_do_not_tell_is_none() -> None:
    """Points decide nothing where the interval includes no difference."""
    clear, unclear = _similar(90, 80, 90, 80, 90, 80), _similar(0, 80, 0, 80, 0, 90)
    worse, other = _similar(70, 70, 70, 70, 70, 70), _similar(90, 0, 90, 0, 90, 0)
    found = {(40, "ours, p = 1"): clear, (40, fig15.INFINITY): worse}
    found |= {(60, "ours, p = 1"): unclear, (60, fig15.INFINITY): other}
    unsure = gap(unclear, other)
    assert unsure is not None and unsure.points < 0 and not unsure.tells
    assert fig15._infinity(found, (40, 60)).verdict == "holds"
    found[60, fig15.INFINITY] = _similar(90, 90, 90, 90, 90, 100)
    assert fig15._infinity(found, (40, 60)).verdict == "partly"
    assert fig15._infinity(found, (60,)).verdict == "does not hold"


def test_few_prompts_have_no_interval_and_decide_nothing() -> None:
    few = gap(_similar(90, 80, 90, 80), _similar(80, 75, 80, 75))
    assert few is not None and few.low > 0 and not few.tells and not few.within(100)
    assert few.short == "+7.5 (4 prompts)"
    alike = gap(_similar(*[50.0] * 5), _similar(*[50.0] * 5))
    assert alike is not None and alike.tells and not alike.better and not alike.worse and alike.within(0)


def _gaps(**values: list[float]) -> dict[str, Gap]:
    """Gains of each task's prompts."""
    found = {
        task: gap(_similar(*(50 + v for v in each)), _similar(*[50.0] * len(each))) for task, each in values.items()
    }
    return {task: each for task, each in found.items() if each is not None}


UP, DOWN, NOISE, ZERO = [10.0, 11, 12, 13, 14], [-10.0, -11, -12, -13, -14], [30.0, -30, 20, -25, 5], [0.0] * 5


@pytest.mark.parametrize(
    ("classify", "compare", "verdict"),
    [
        (ZERO, ZERO, "holds"),
        (ZERO, UP, "partly"),
        (DOWN, UP, "does not hold"),
        (NOISE, ZERO, "undecided"),
        (NOISE, UP, "does not hold"),
        (ZERO[:4], ZERO, "undecided"),
    ],
)
def test_equal_means_an_interval_within_the_bounds(classify: list[float], compare: list[float], verdict: str) -> None:
    assert fig13._same(_gaps(classify=classify, compare=compare)).verdict == verdict


@pytest.mark.parametrize(
    ("others", "qa", "verdict"),
    [
        (UP, UP, "holds"),
        (UP, NOISE, "partly"),
        (UP, DOWN, "partly"),
        (NOISE, NOISE, "undecided"),
        (NOISE, DOWN, "does not hold"),
    ],
)
def test_better_means_an_interval_above_zero_on_every_task(others: list[float], qa: list[float], verdict: str) -> None:
    claim = fig13._better(_gaps(converse=others, qa=qa, summarise=others), "why")
    assert claim.verdict == verdict
    assert ("qa" in claim.why) == (verdict in ("partly", "does not hold"))


def test_what_every_prompt_gave_is_a_table_from_which_gaps_can_be_drawn_anew() -> None:
    ways = {
        "a": _similar(90, 80, 70),
        "b": _similar(80, 75, 72),
        "c": Accuracy(Judged([], [], [], [], {}, "no"), Similar([], None)),
    }
    table = accuracy.by_prompt(ways)
    assert table.columns[3:] == ("a: tokens agreed", "a: similarity (%)", "b: tokens agreed", "b: similarity (%)")
    assert [row[4] - row[6] for row in table.rows] == [10, 5, -2] and not table.shown
    assert accuracy.by_prompt({"c": ways["c"]}).rows == ()


def test_agreement_weighs_prompts_by_their_tokens() -> None:
    one = Accuracy(Judged(["qa", "qa"], [1, 9], [1, 0], [0.0, 0.0], {}), Similar(["qa", "qa"], None))
    two = Accuracy(Judged(["qa", "qa"], [1, 9], [0, 0], [0.0, 0.0], {}), Similar(["qa", "qa"], None))
    found = gap(one, two)
    assert one.value() == 10.0 and found is not None and found.points == pytest.approx(10.0)


def test_tolerance_is_read_at_the_papers_share_of_layers() -> None:
    curves = {"agreement": {"qa": np.array([1.0, 0.85, 0.5, 0.4])}}
    known = Sensitivity("agreement", curves, 4)
    assert fig5._claim(known, "half", ("qa",), 0.5, 0.8, "why").verdict == "holds"
    assert fig5._claim(known, "half", ("qa",), 0.5, -0.8, "why").verdict == "does not hold"
    assert fig5._claim(known, "half", ("converse",), 0.5, 0.8, "why").verdict == "not measured"


def test_one_experiment_end_to_end(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fig10, "COARSE_P", (0, 2))
    monkeypatch.setattr(fig10, "ORDERS", fig10.ORDERS[:1])
    found = fig10.run(bench)
    write_finding(tmp_path / "fig10", "fig10", found, {"run": bench.mark})
    kept = read_finding(tmp_path / "fig10")
    assert kept is not None and [claim.verdict for claim in kept.claims] == ["not measured"]
    assert len(kept.tables[0].rows) == 2 * 2
    assert (tmp_path / "fig10" / "perplexity.png").stat().st_size > 1000
