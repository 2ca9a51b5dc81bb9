"""Figure 7: do consecutive layers choose alike?"""

from __future__ import annotations

from typing import Any

import numpy as np

from emoe.bench.reproduce import correlation as of
from emoe.bench.reproduce import drawing, transitions
from emoe.bench.reproduce.accuracy import graded
from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table
from emoe.bench.reproduce.needs import pairs
from emoe.bench.reproduce.sources import Source, left_out, sources
from emoe.bench.reproduce.workbench import Workbench

PAPER = 0.50
NEEDED = 0.9 * PAPER
MARGIN = 0.1
TOKENS = (4_000, 20_000)
"""Tokens on each side: quick, and in full."""
PROMPT, OTHER_PROMPT, NUMBERED = "a prompt", "two prompts", "a prompt, not renamed"
TOKEN, OTHER_TOKEN = "a token", "two tokens"
PROMPT_C, NOTHING_C = "c, a prompt", "c, no preference"


def run(bench: Workbench) -> Finding:
    """r between the counts of layers i and i + 1, experts renamed as fits the prompts to learn from."""
    found = {each.name: _curves(each, bench.pick(*TOKENS), bench.settings.seed) for each in sources(bench)}
    rows = tuple(
        (name, curve, layer, round(value, 4))
        for name, curves in found.items()
        for curve, values in curves.items()
        for layer, value in enumerate(values)
    )

    def draw() -> Any:
        figure, axes = drawing.panels(len(found), width=4.4)
        for ax, (name, curves) in zip(axes[0], found.items(), strict=True):
            drawing.paper_line(ax, PAPER, "paper, about 0.50")
            shown = (PROMPT, OTHER_PROMPT, TOKEN, OTHER_TOKEN, NUMBERED)
            points = {curve: list(enumerate(curves.get(curve, ()))) for curve in shown}
            drawing.lines(ax, points, "from MoE layer", "r of consecutive layers", name)
            ax.set_ylim(min(-0.2, ax.get_ylim()[0]), 1)
        drawing.shared_legend(figure)
        return figure

    caption = "Cross-correlation of the counts of consecutive layers, experts renamed one to one on other prompts."
    table = Table("layers", "r and c by layer", ("routes", "of", "from layer", "mean"), rows, shown=False)
    note = (
        "Two prompts (two tokens): a layer of one and the next layer of another one, drawn at random; what is "
        "left is that popular experts are paired with popular ones. Not renamed: an expert's number means "
        "nothing from layer to layer, so r between the numbers as they are is around 0."
    )
    claims = tuple(_claim(name, curves) for name, curves in found.items())
    return Finding(
        claims, (table,), (Picture("layers", caption, draw),), (note, *left_out(bench, "what is said of single tokens"))
    )


def _curves(source: Source, most: int, seed: int) -> dict[str, list[float]]:
    """Means by curve and layer."""
    rng = np.random.default_rng(seed)
    learn, score = source.learn.counts(), source.score.counts()
    plain = of.without_preference(score, rng)
    names = (PROMPT, OTHER_PROMPT, NUMBERED, PROMPT_C, NOTHING_C, *((TOKEN, OTHER_TOKEN) if source.ordered else ()))
    found: dict[str, list[float]] = {name: [] for name in names}
    tokens = [transitions.some(trace, most, seed) for trace in (source.learn, source.score)]
    for layer in range(score.shape[1] - 1):
        partner = of.renaming(learn[:, layer], learn[:, layer + 1])
        x, y = score[:, layer], score[:, layer + 1][:, partner]
        found[PROMPT].append(of.mean(of.correlation(x, y)))
        found[OTHER_PROMPT].append(of.mean(of.correlation(x, rng.permutation(y))))
        found[NUMBERED].append(of.mean(of.correlation(x, score[:, layer + 1])))
        found[PROMPT_C].append(of.mean(of.uncentred(x, y)))
        found[NOTHING_C].append(of.mean(of.uncentred(plain[:, layer], plain[:, layer + 1])))
        if source.ordered:
            known, scored = (
                [transitions.one_hot(routes[:, at], source.score.num_experts) for at in (layer, layer + 1)]
                for routes in tokens
            )
            scored[1] = scored[1][:, of.renaming(*known)]
            found[TOKEN].append(of.mean(of.correlation(*scored)))
            found[OTHER_TOKEN].append(of.mean(of.correlation(scored[0], rng.permutation(scored[1]))))
    return found


def _claim(name: str, curves: dict[str, list[float]]) -> Claim:
    r, other, plain, c, nothing = (
        float(np.mean(curves[curve])) for curve in (PROMPT, OTHER_PROMPT, NUMBERED, PROMPT_C, NOTHING_C)
    )
    verdict = graded([r >= NEEDED, r >= other + MARGIN])
    token = f", of a token {float(np.mean(curves[TOKEN])):.2f}" if TOKEN in curves else ""
    return Claim(
        f"consecutive layers choose alike ({name})",
        "about 0.50",
        f"r {r:.2f} of a prompt{token}",
        verdict,
        f"A layer of one prompt and the next of another have {other:.2f}; experts not renamed {plain:.2f}. Means not "
        f"subtracted: c {c:.2f}, but routing without any preference has {nothing:.2f}.",
    )


EXPERIMENT = Experiment(
    name="fig7",
    title="Figure 7: consecutive layers",
    question="Do consecutive layers choose alike?",
    method=f"{of.METHOD} Here x are the counts of a prompt in one layer and y in the next. Experts have no "
    "numbers in common from layer to layer, so those of the next layer are renamed, one to one, as "
    "makes r highest on the prompts to learn from; r is then averaged over the other prompts. Also for "
    "single tokens, whose counts are 0 and 1. The claim holds from r = 0.9 x 0.50 of a prompt if that "
    f"is {MARGIN} more than between two prompts; partly with one of the two.",
    expected="About 0.50 between consecutive layers.",
    kind="routing",
    minutes=(0.3, 1),
    run=run,
    needs=(pairs,),
)
