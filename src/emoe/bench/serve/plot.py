"""A load's report as a picture: how long each task waited, and how much of it kept its targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from emoe.bench.serve.results import LoadReport
from emoe.profiling.plot import check_plot, pyplot

# Okabe and Ito's palette, told apart by people of every kind of colour vision; the dashes tell apart what repeats.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_DASHES = ("-", "--", ":", "-.")


def draw(report: LoadReport, file: Path) -> None:
    """Three panels: the share of answers that had begun, and had ended, after so long; the share within the targets.

    Raises:
        UsageError: matplotlib is missing, or the file cannot be written.
    """
    check_plot(file)
    plt = pyplot()
    from matplotlib.ticker import LogFormatter

    figure, (first, whole, met) = plt.subplots(
        1, 3, figsize=(13.0, 4.2), layout="constrained", width_ratios=(1.0, 1.0, 0.8)
    )
    names = [task or "(none)" for task in report.tasks]
    for i, task in enumerate(report.tasks):
        mine = [record for record in report.records if record.task == task and record.ok]
        style = {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": _DASHES[i % len(_DASHES)],
            "linewidth": 1.7,
            "label": names[i],
        }
        _curve(first, [1e3 * record.ttft_s for record in mine if record.ttft_s is not None], style)
        _curve(whole, [1e3 * record.e2e_s for record in mine if record.e2e_s is not None], style)
    for axis, title in ((first, "time to first token (ms)"), (whole, "end-to-end latency (ms)")):
        axis.set_xlabel(title)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.5)))  # 30, not 3 x 10^1
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    first.set_ylabel("share of answers")
    _bars(met, report, names)
    for axis in (first, whole, met):
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    handles, labels = first.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(labels)), frameon=False)
    found = report.summary()
    figure.suptitle(
        f"{report.server.model}: {found.requests} requests in {found.duration_s:.0f} s, goodput {found.goodput:.2f} of "
        f"{found.per_s(found.requests):.2f} requests/s",
        fontsize=11,
    )
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _curve(axis: Any, values: list[float], style: dict[str, Any]) -> None:
    if values:
        ordered = np.sort(values)
        shares = np.arange(len(ordered) + 1) / len(ordered)
        axis.step([ordered[0], *ordered], shares, where="post", **style)


def _bars(axis: Any, report: LoadReport, names: list[str]) -> None:
    """One bar for each task: within the targets, whole but too slow, and failed or refused."""
    found = [report.of_task(task) for task in report.tasks]
    places = np.arange(len(names))
    met = np.array([each.met / each.requests for each in found])
    whole = np.array([each.successful / each.requests for each in found])
    axis.barh(places, met, color="#0072B2", label="within targets")
    axis.barh(places, whole - met, left=met, color="#E69F00", label="too slow")
    axis.barh(places, 1 - whole, left=whole, color="#7F7F7F", hatch="//", edgecolor="white", label="failed, refused")
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of requests")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8, handlelength=1.2)
