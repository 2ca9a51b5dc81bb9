"""Figure 3: do a token's experts in one layer tell its experts in the next?"""

from __future__ import annotations

from typing import Any

import numpy as np

from emoe.bench.reproduce import drawing, transitions
from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table, Verdict
from emoe.bench.reproduce.needs import pairs
from emoe.bench.reproduce.sources import Source, left_out, sources
from emoe.bench.reproduce.workbench import Workbench

STRONG, WEAK = 1.5, 1.1
"""How many times the experts that popularity names have to be named by transitions."""
SCORED = (4_000, 20_000)
"""Tokens scored: quick, and in full."""
COLUMNS = (
    "routes",
    "from layer",
    "named by transitions",
    "by popularity",
    "by chance",
    "tokens shuffled",
    "tokens shuffled within prompts",
    "information, bits",
    "shuffled, bits",
    "entropy, bits",
)


def run(bench: Workbench) -> Finding:
    """Transitions of every source that knows its tokens' routes, learned on one half and scored on the other."""
    rows: list[tuple[Any, ...]] = []
    maps: dict[str, dict[int, Any]] = {}
    claims = []
    found = sources(bench, ordered=True)
    for number, source in enumerate(found):
        bench.step("transitions", number, len(found))
        pairs = transitions.pairs_of(source.learn)
        figures = _figures(source, pairs, bench.pick(*SCORED), bench.settings.seed)
        rows += [
            (source.name, int(source.learn.layers[i]), *(round(float(v), 4) for v in f)) for i, f in enumerate(figures)
        ]
        maps[source.name] = {
            layer: transitions.onward(pairs)[layer] * source.learn.top_k
            for layer in sorted({0, (len(pairs) - 1) // 2, len(pairs) - 1})
        }
        claims.append(_claim(source.name, figures.mean(axis=0)))
    bench.step("transitions", len(found), len(found))

    def draw() -> Any:
        columns = max(len(layers) for layers in maps.values())
        figure, axes = drawing.panels(columns, len(maps), width=3.9, height=3.2)
        for line, (name, layers) in zip(axes, maps.items(), strict=True):
            for ax, (layer, shares) in zip(line, layers.items(), strict=False):
                drawing.heat(
                    ax, shares, f"expert in layer {layer + 1}", f"expert in layer {layer}", "share of its tokens", name
                )
        return figure

    def draw_named() -> Any:
        figure, axes = drawing.panels(len(maps), width=4.4)
        for ax, name in zip(axes[0], maps, strict=True):
            mine = [row for row in rows if row[0] == name]
            curves = {COLUMNS[at]: [(row[1], 100 * row[at]) for row in mine] for at in (2, 3, 6, 5, 4)}
            drawing.lines(ax, curves, "from layer", "next experts named, %", name)
            ax.set_ylim(0, None)
        drawing.shared_legend(figure)
        return figure

    heat = [
        (name, layer, a, b, round(float(share), 3))
        for name, layers in maps.items()
        for layer, shares in layers.items()
        for (a, b), share in np.ndenumerate(shares)
        if share >= 0.05
    ]
    return Finding(
        tuple(claims),
        (
            Table("structure", "What transitions say, by layer", COLUMNS, tuple(rows), shown=False),
            Table(
                "maps",
                "The maps drawn: shares of at least 0.05",
                ("routes", "from layer", "expert", "next expert", "share of its tokens"),
                tuple(heat),
                shown=False,
            ),
        ),
        (
            Picture(
                "maps",
                "Of the tokens of an expert (row), the share that goes on to each expert of the next layer; "
                "first, middle and last pair of layers. Rows sum to the experts of a token.",
                draw,
            ),
            Picture("named", "Share of the next layer's experts that are named, by layer.", draw_named),
        ),
        left_out(bench),
    )


def _figures(source: Source, pairs: Any, most: int, seed: int) -> Any:
    """float64 [layers - 1, figures]: COLUMNS from the third on."""
    experts, k = source.learn.num_experts, source.learn.top_k
    routes = transitions.some(source.score, most, seed)
    mixed = transitions.pairs_of(transitions.shuffled(source.learn, seed))
    within = transitions.pairs_of(transitions.shuffled(source.learn, seed, within=True))
    bits, entropy = transitions.information(pairs)
    return np.stack(
        [
            transitions.named(pairs, routes),
            transitions.popular(source.learn.counts().sum(axis=0), routes),
            np.full(len(pairs), k / experts),
            transitions.named(mixed, routes),
            transitions.named(within, routes),
            bits,
            transitions.information(mixed)[0],
            entropy,
        ],
        axis=1,
    )


def _claim(name: str, means: Any) -> Claim:
    by_transitions, by_popularity, _, _, within, bits, none, entropy = (float(value) for value in means)
    times = by_transitions / by_popularity
    verdict: Verdict = "holds" if times >= STRONG else "partly" if times >= WEAK else "does not hold"
    return Claim(
        f"transitions between layers have strong structure ({name})",
        "seen in heat maps; no number",
        f"name {by_transitions:.0%} of a token's next experts, {times:.1f}x what popularity names "
        f"({by_popularity:.0%})",
        verdict,
        f"Strong is meant to be from {STRONG}x. A pair of experts shares {bits:.2f} of {entropy:.2f} bits "
        f"(shuffled tokens: {none:.2f}); tokens shuffled within prompts name {within:.0%}, which is what the "
        "prompt alone explains.",
    )


EXPERIMENT = Experiment(
    name="fig3",
    title="Figure 3: transitions between layers",
    question="Do a token's experts in one layer tell its experts in the next?",
    method="Pairs of experts that one token chose in consecutive layers are counted on half of the prompts. On "
    "the other half, the k experts of the next layer with the highest summed transition shares from the "
    "token's k experts are named; counted is the share of its real next experts among them. Compared "
    "with naming the k most popular, with transitions counted after each layer's choices were dealt to "
    "other tokens at random, or to other tokens of the same prompt, and with k of E by chance. "
    f"Structure is called strong if transitions name {STRONG} times what popularity does, weak (partly) "
    f"from {WEAK} times. Also: the mutual information of the two experts of a pair.",
    expected="The heat maps of layer i to i + 1 have strong structure.",
    kind="routing",
    minutes=(0.3, 1),
    run=run,
    needs=(pairs,),
)
