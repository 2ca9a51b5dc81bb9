"""Run several experiments: what is done is left alone, one that fails does not stop the others."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from emoe.bench.reproduce.accuracy import RANDOM
from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Finding, Kept, read_finding, write_finding
from emoe.bench.reproduce.page import write_page
from emoe.bench.reproduce.room import hours
from emoe.bench.reproduce.workbench import Workbench
from emoe.errors import EmoeError


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one experiment: its finding, or why there is none. seconds: 0 where it was done before."""

    experiment: Experiment
    kept: Kept | None
    failure: str = ""
    seconds: float = 0.0


def run_all(bench: Workbench, experiments: Sequence[Experiment], rejudge: bool = False) -> list[Outcome]:
    """Run what is not done yet, write each finding and the page; return what became of each.

    An experiment that is refused (`EmoeError`: a missing option, a file that cannot be read) is reported, and the next
    one runs; what can be refused beforehand is, before the first begins. Everything else, Ctrl-C too, ends the run;
    what is done is kept. rejudge: make findings anew of what OUT/work holds, and measure nothing.
    """
    bench.frozen = rejudge
    outcomes = []
    left = [] if rejudge else [what for what in experiments if not _done(bench, read_finding(_folder(bench, what)))]
    refused = _refused(bench, left)
    _estimate(bench, [what for what in left if what.name not in refused])
    for number, what in enumerate(experiments, start=1):
        folder = _folder(bench, what)
        done = read_finding(folder)
        if _done(bench, done) and not rejudge:
            bench.say(f"{what.name}: done before, {folder}")
            outcomes.append(Outcome(what, done))
            continue
        if what.name in refused:
            outcomes.append(Outcome(what, None, refused[what.name]))
            continue
        bench.say(f"{what.name} ({number} of {len(experiments)}): {what.title}")
        start = time.monotonic()
        try:
            found = what.run(bench)
        except EmoeError as error:
            bench.say(f"{what.name} failed: {error}")
            outcomes.append(Outcome(what, None, str(error), time.monotonic() - start))
            continue
        found = _of_random(bench, what, found)
        seconds = time.monotonic() - start
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        about = bench.about() | {"made": now, "seconds": round(seconds, 1), "run": bench.mark}
        if rejudge and done is not None:  # when and where it was measured stays
            about = {**done.about, "run": bench.mark, "judged again": now}
        outcomes.append(Outcome(what, write_finding(folder, what.name, found, about), "", seconds))
        write_page(bench.settings.out)
        for claim in found.claims:
            bench.say(f"  {claim.verdict}: {claim.text}: paper {claim.paper}, here {claim.here}")
    write_page(bench.settings.out)
    return outcomes


def _of_random(bench: Workbench, what: Experiment, found: Finding) -> Finding:
    """What random weights cannot say is not judged, and a note says so."""
    if bench.weights is None:
        return found
    claims = found.claims
    if what.kind == "quality":
        why = "the weights are random: no accuracy is measured."
        claims = tuple(replace(claim, verdict="not measured", why=why) for claim in claims)
    return replace(found, claims=claims, notes=(RANDOM, *found.notes))


def _folder(bench: Workbench, what: Experiment) -> Path:
    return bench.settings.out / what.name


def _done(bench: Workbench, kept: Kept | None) -> bool:
    return kept is not None and kept.about.get("run") == bench.mark


def _refused(bench: Workbench, experiments: Sequence[Experiment]) -> dict[str, str]:
    """Why, of each that this run cannot do; said before the first one begins."""
    found = {}
    for what in experiments:
        try:
            what.check(bench)
        except EmoeError as error:
            found[what.name] = str(error)
            bench.say(f"{what.name} cannot be done: {error}")
    return found


def _estimate(bench: Workbench, experiments: Sequence[Experiment]) -> None:
    """How long that may take on a model of another size; emoe-nano's minutes are in the list of experiments."""
    if bench.settings.model is None or not experiments or bench.frozen:
        return
    minutes = sum(each.minutes[0 if bench.settings.quick else 1] for each in experiments)
    found = hours(bench, minutes)
    if found > 0.5:
        bench.say(
            f"about {found:,.0f} hours by the size of {bench.name}, within a factor of a few"
            f"{', and more where experts are read from disk again and again' if bench.budget is not None else ''}: "
            "fewer --prompts, a smaller --max-new-tokens and --quick shorten it; a run that was stopped goes on."
        )
