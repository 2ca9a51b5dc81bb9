"""One look for all pictures: readable in print and on a dark screen, told apart by people who see fewer colours.

matplotlib is the optional extra `plot`. A picture has its own light ground, so a dark page does not hide its lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emoe.profiling.plot import COLOURS, MARKERS, fewer_colours, pyplot

__all__ = [
    "COLOURS",
    "MARKERS",
    "bars",
    "finish",
    "heat",
    "legend",
    "lines",
    "panels",
    "paper_band",
    "paper_line",
    "paper_points",
    "save",
]

HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++", "oo")
PAPER = "#8C2D04"
"""What marks the paper's number."""
DPI = 130

Points = Sequence[tuple[float, float]]


def panels(columns: int, rows: int = 1, width: float = 4.2, height: float = 3.2) -> tuple[Any, Any]:
    """A figure and its axes, an array [rows][columns]; the legend and titles fit. Sizes in inches of one panel.

    Raises:
        UsageError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    figure.patch.set_facecolor("white")
    figure.set_layout_engine("constrained")
    return figure, axes


def lines(
    ax: Any,
    curves: Mapping[str, Points],
    x: str,
    y: str,
    title: str = "",
    spread: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """A curve for each name, told apart by colour, marker and dash; `spread`: (lowest, highest) of each of its points.

    x and y: what the axes show, with the unit.
    """
    for number, (name, points) in enumerate(curves.items()):
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        style = {"color": COLOURS[number % 8], "marker": MARKERS[number % 8], "markersize": 4.5, "linewidth": 1.5}
        # Of many points only some are marked: fewer paths to draw, and lines that can be told apart.
        style["markevery"] = max(1, len(xs) // 12)
        ax.plot(xs, ys, linestyle=("-", "--", "-.", ":")[(number // 2) % 4], label=name, **style)
        if spread is not None and name in spread:
            low, high = zip(*spread[name], strict=True)
            ax.fill_between(xs, low, high, color=COLOURS[number % 8], alpha=0.15, linewidth=0)
    if all(float(at).is_integer() for points in curves.values() for at, _ in points):
        ax.xaxis.get_major_locator().set_params(integer=True)
    finish(ax, x, y, title)


def bars(ax: Any, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], y: str, title: str = "") -> None:
    """Bars side by side in each group, told apart by colour and hatching; None leaves a gap."""
    width = 0.8 / max(1, len(series))
    for number, (name, values) in enumerate(series.items()):
        at = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        heights = [0.0 if value is None else value for value in values]
        style = {"color": COLOURS[number % 8], "edgecolor": "white", "hatch": HATCHES[number % 8], "linewidth": 0.5}
        ax.bar(at, heights, width, label=name, **style)
    ax.set_xticks(range(len(groups)), groups, rotation=30 if max(map(len, groups), default=0) > 6 else 0, ha="center")
    finish(ax, "", y, title)


def heat(ax: Any, values: Any, x: str, y: str, label: str, title: str = "", highest: float | None = None) -> None:
    """A matrix as colours from light (0) to dark (`highest`, by default the largest), with its scale beside it."""
    image = ax.imshow(values, cmap="magma_r", vmin=0.0, vmax=highest, aspect="auto", interpolation="nearest")
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    finish(ax, x, y, title, grid=False)


def paper_line(ax: Any, value: float, text: str) -> None:
    """The paper's number as a labelled horizontal line."""
    ax.axhline(value, color=PAPER, linestyle=(0, (5, 2)), linewidth=1.1)
    _paper_text(ax, value, text, "bottom")


def paper_band(ax: Any, low: float, high: float, text: str) -> None:
    """The paper's range as a labelled, shaded band across the picture."""
    ax.axhspan(low, high, color=PAPER, alpha=0.08, linewidth=0)
    _paper_text(ax, low, text, "bottom")


def _paper_text(ax: Any, value: float, text: str, va: str) -> None:
    """At the right end, readable also where a curve passes."""
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
    style = {"ha": "right", "va": va, "fontsize": 7, "color": PAPER, "bbox": box, "zorder": 5}
    ax.annotate(text, (0.99, value), xycoords=("axes fraction", "data"), **style)


def paper_points(ax: Any, points: Points, text: str = "paper") -> None:
    """The paper's numbers as white stars at their places."""
    if points:
        xs, ys = zip(*points, strict=True)
        style = {"facecolors": "white", "edgecolors": PAPER, "linewidths": 1.1}
        ax.scatter(xs, ys, marker="*", s=70, label=text, zorder=4, clip_on=False, **style)


def legend(ax: Any, outside: bool = False) -> None:
    """The names; `outside`: to the right of the axes."""
    where = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if outside else {"loc": "best"}
    ax.legend(fontsize=7.5, frameon=False, **where)


def shared_legend(figure: Any) -> None:
    """The names of all panels' curves, each once, to the right of them."""
    handles: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)


def finish(ax: Any, x: str, y: str, title: str = "", grid: bool = True) -> None:
    """Labels of the axes, title, quiet grid."""
    ax.set_facecolor("white")
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.set_title(title, fontsize=9.5)
    ax.tick_params(labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if grid:
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)


def save(figure: Any, stem: Path) -> None:
    """Write STEM.png and STEM.svg, the same bytes for the same figure, and close it."""
    plt = pyplot()
    plt.rcParams["svg.hashsalt"] = stem.name
    figure.savefig(stem.with_suffix(".png"), dpi=DPI, metadata={"Software": None})
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    shades = any(ax.images for ax in figure.axes)
    plt.close(figure)
    if not shades:  # a heat map needs all its colours
        fewer_colours(stem.with_suffix(".png"))
