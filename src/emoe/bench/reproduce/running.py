"""Run several experiments: what is done is left alone, one that fails does not stop the others."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass

from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Kept, read_finding, write_finding
from emoe.bench.reproduce.page import write_page
from emoe.bench.reproduce.workbench import Workbench
from emoe.errors import EmoeError


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one experiment: its finding, or why there is none. seconds: 0 where it was done before."""

    experiment: Experiment
    kept: Kept | None
    failure: str = ""
    seconds: float = 0.0


def run_all(bench: Workbench, experiments: Sequence[Experiment]) -> list[Outcome]:
    """Run what is not done yet, write each finding and the page; return what became of each.

    An experiment that is refused (`EmoeError`: a missing option, a file that cannot be read) is reported, and the next
    one runs. Everything else, Ctrl-C too, ends the run; what is done is kept.
    """
    outcomes = []
    for number, what in enumerate(experiments, start=1):
        folder = bench.settings.out / what.name
        done = read_finding(folder)
        if done is not None and done.about.get("run") == bench.mark:
            bench.say(f"{what.name}: done before, {folder}")
            outcomes.append(Outcome(what, done))
            continue
        bench.say(f"{what.name} ({number} of {len(experiments)}): {what.title}")
        start = time.monotonic()
        try:
            found = what.run(bench)
        except EmoeError as error:
            bench.say(f"{what.name} failed: {error}")
            outcomes.append(Outcome(what, None, str(error), time.monotonic() - start))
            continue
        seconds = time.monotonic() - start
        about = bench.about() | {
            "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "seconds": round(seconds, 1),
            "run": bench.mark,
        }
        outcomes.append(Outcome(what, write_finding(folder, what.name, found, about), "", seconds))
        write_page(bench.settings.out)
        for claim in found.claims:
            bench.say(f"  {claim.verdict}: {claim.text}: paper {claim.paper}, here {claim.here}")
    write_page(bench.settings.out)
    return outcomes
