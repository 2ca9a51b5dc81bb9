"""Curves of simulated policies against capacity, as a picture. matplotlib is the optional extra `plot`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe.errors import UsageError

SUFFIXES = (".png", ".svg")

# Okabe and Ito's palette, which people of every kind of colour vision tell apart; black is kept for the bound.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_MARKERS = "osD^vPX"
_DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes: a curve of (capacity, value) points for each name; `bound` is drawn in black."""

    label: str
    curves: dict[str, list[tuple[float, float]]]
    bound: str


def check_plot(path: Path | str) -> Path:
    """Return the path if a picture can be written there.

    Raises:
        UsageError: matplotlib is not installed, the suffix is unknown, or the folder cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: name a file that ends in {' or '.join(SUFFIXES)}.")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"--plot {path}: give a file in a folder that can be written to.")
    _matplotlib()
    return path


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write the picture: panels side by side, one legend. Raises UsageError as `check_plot` does."""
    figure = _matplotlib()(figsize=(5.2 * len(panels) + 1.8, 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=True):
        for i, name in enumerate(names):
            if name not in panel.curves:
                continue
            points = sorted(panel.curves[name])
            style = {
                "color": _COLOURS[i % len(_COLOURS)],
                "marker": _MARKERS[i % len(_MARKERS)],
                "linestyle": _DASHES[i // len(_COLOURS) % len(_DASHES)],
            }
            if name == panel.bound:
                style = {"color": "black", "marker": ".", "linestyle": "-"}
            shares, values = zip(*points, strict=True)
            (handles[name],) = axis.plot(
                [share * 100 for share in shares], values, linewidth=1.6, markersize=5, **style
            )
        axis.set_xlabel("experts of a layer that fit (%)")
        axis.set_ylabel(panel.label)
        axis.set_xticks(sorted({round(share * 100, 6) for points in panel.curves.values() for share, _ in points}))
        axis.grid(alpha=0.3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def _matplotlib() -> Any:
    """matplotlib's Figure, without pyplot: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("--plot draws with matplotlib, which is not installed: pip install 'emoe[plot]'.") from error
    return Figure
