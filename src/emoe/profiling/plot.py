"""Draw a profile's sensitivity (the paper's Figure 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from emoe.errors import UsageError
from emoe.tasks.profile import Profile
from emoe.tasks.sensitivity import MEASURES, Sensitivity

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito's, which people of every kind of colour vision tell apart."""
MARKERS = "osD^vPX*"
FORMATS = (".png", ".svg", ".pdf")


def pyplot() -> Any:
    """matplotlib's, drawing to files only.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UsageError('plots need matplotlib: pip install "emoe[plot]".') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_plot(file: Path) -> None:
    """Refuse, before long work, a plot that could not be drawn.

    Raises:
        UsageError: no matplotlib, another kind of file, or no such folder.
    """
    pyplot()
    if file.suffix.lower() not in FORMATS or not file.absolute().parent.is_dir():
        raise UsageError(f"cannot plot to {file}: give a {', '.join(FORMATS)} file in a folder that exists.")


def plot_sensitivity(profile: Profile, file: Path) -> None:
    """Write `sensitivity_figure` to a file.

    Raises:
        UsageError: the profile has no sensitivity, or the plot cannot be drawn.
    """
    check_plot(file)
    figure = sensitivity_figure(profile.sensitivity)
    figure.savefig(file, dpi=110)
    pyplot().close(figure)
    if file.suffix.lower() == ".png":
        fewer_colours(file)


def sensitivity_figure(known: Sensitivity) -> Any:
    """One panel for each measure: first layers that route at random -> how alike the answers stay, by task.

    Raises:
        UsageError: nothing was measured, or matplotlib is not installed.
    """
    if not known.curves:
        raise UsageError("the profile holds no sensitivity: make it with at least one --sensitivity-prompts.")
    plt = pyplot()
    names = [name for name in MEASURES if name in known.curves]
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.4), squeeze=False)
    layers = np.arange(known.layers + 1)
    for ax, name in zip(axes[0], names, strict=True):
        for i, (task, curve) in enumerate(known.curves[name].items()):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            ax.plot(layers, [1.0, *curve], color=colour, marker=marker, markersize=4, linewidth=1.3, label=task)
        ax.axhline(known.threshold, color="#555555", linestyle="--", linewidth=0.9, label="threshold")
        ax.set_title(name + (" (decides)" if name == known.measure else ""), fontsize=10)
        ax.set_xlabel("first layers that route at random")
        ax.set_xlim(0, known.layers)
        ax.set_ylim(min(0.0, ax.get_ylim()[0]), max(1.05, ax.get_ylim()[1]))
        ax.grid(alpha=0.25)
    axes[0][0].set_ylabel("1: as the full model")
    axes[0][-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure


def fewer_colours(file: Path) -> None:
    """Lines and text need no 24 bits a pixel: a quarter of the bytes, and no difference to see."""
    from PIL import Image  # matplotlib depends on it

    with Image.open(file) as image:
        small = image.convert("RGB").quantize(128)
    small.save(file, optimize=True)
