"""The sensitivity in a profile, as a table and a plot (the paper's Figure 5).

    python -m bench.sensitivity [PROFILE] [--threshold 0.85] [--plot docs/figures/sensitivity_nano.png]

PROFILE is a folder that `emoe profile` made; without it, the one that emoe-nano comes with. In column l of a table the
first l MoE layers route at random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from emoe import nano
from emoe.profiling.plot import plot_sensitivity
from emoe.tasks.profile import Profile
from emoe.tasks.sensitivity import MEASURES


def table(profile: Profile, measure: str, threshold: float | None) -> str:
    """One measure's curves in Markdown, with the layers that may be routed wrongly."""
    known = profile.sensitivity
    head = ["task", *map(str, range(1, known.layers + 1)), "insensitive layers"]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for task, curve in known.curves[measure].items():
        count = int((~known.sensitive(task, threshold, measure)).sum())
        lines.append(" | ".join([task, *(f"{x:.3f}" for x in curve), str(count)]))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Print one table for each measure; draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path, nargs="?", default=nano.profile_path())
    parser.add_argument("--threshold", type=float, help="default: the profile's own")
    parser.add_argument("--plot", type=Path, help="a .png, .svg or .pdf file")
    args = parser.parse_args()
    profile = Profile.read(args.profile)
    known = profile.sensitivity
    for measure, curves in known.curves.items():
        decides = ", which decides" if measure == known.measure else ""
        prompts = sum((known.prompts or {}).get(task, 0) for task in curves)
        print(f"{measure}{decides}: {MEASURES[measure]} ({prompts} prompts)\n")
        print(table(profile, measure, args.threshold) + "\n")
    if args.plot is not None:
        plot_sensitivity(profile, args.plot)


if __name__ == "__main__":
    main()
