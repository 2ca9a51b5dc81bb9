"""What each constant of affinity does to simulated goodput and latency: halved, doubled, one at a time.

    python -m bench.affinity_constants --arrivals FILE [--requests 1500] [--seeds 0,1] [--json FILE]

Two situations. "mixtral": `emoe simulate --model-like mixtral --slo-scale 5,5`, arrivals and lengths as in the file, at
--rates. "nano": emoe-nano's shape and costs with 40 % of the experts, 4 running, the file's times at --nano-rates and a
tenth of its lengths. Each line has the ratio of goodput and of mean latency to what the constants as they are give:
means over rates and seeds, the least and the greatest, and whether one of the means is off by more than 1 %. Only the
first rows of the file are read: those that the constants may be tuned on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from emoe.cli import main as emoe
from emoe.scheduling import affinity

CONSTANTS = ("STRETCH", "LATE", "MARGIN", "CROWD", "HURRY", "OWED", "OWED_EVERY", "TRIED")
WHOLE = ("OWED_EVERY", "TRIED")
TELLS = 0.01


def run(words: list[str]) -> dict[str, float]:
    """One simulation: goodput, mean latency, share of targets met."""
    out = StringIO()
    with redirect_stdout(out), redirect_stderr(StringIO()):
        code = emoe(words)
    if code:
        raise SystemExit(f"emoe {' '.join(words)} ended with {code}")
    found = json.loads(out.getvalue())
    return {
        "goodput": statistics.mean(each["goodput_per_s"] for each in found),
        "latency": statistics.mean(each["latency_s"]["mean"] for each in found),
        "met": statistics.mean(each["met_share"] for each in found),
    }


def situations(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Names, and the words after `emoe`."""
    base = ["simulate", "--arrivals", str(args.arrivals), "--requests", str(args.requests), "--schedulers", "affinity"]
    made = []
    for seed in args.seeds.split(","):
        common = [*base, "--seeds", seed, "--json"]
        for rate in filter(None, args.rates.split(",")):
            made.append(("mixtral", [*common, "--model-like", "mixtral", "--slo-scale", "5,5", "--rate-scale", rate]))
        for rate in filter(None, args.nano_rates.split(",")):
            nano = ["--length-scale", "0.1", "--max-running", "4", "--kv-tokens", "8192", "--rate-scale", rate]
            made.append(("nano", [*common, *nano]))
    return made


def main() -> None:
    """Print a line for each constant, way and situation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arrivals", type=Path, required=True)
    add("--requests", type=int, default=1500)
    add("--rates", default="0.009,0.011,0.013")
    add("--nano-rates", default="0.1,0.13")
    add("--seeds", default="0,1")
    add("--only", default=",".join(CONSTANTS))
    add("--json", type=Path)
    args = parser.parse_args()
    runs = situations(args)
    before = [(name, run(words)) for name, words in runs]
    for (name, found), (_, words) in zip(before, runs, strict=True):
        told = f"goodput {found['goodput']:.4g}, latency {found['latency']:.4g} s, met {found['met']:.1%}"
        print(f"{name} {words[words.index('--rate-scale') + 1]} seed {words[words.index('--seeds') + 1]}: {told}")
    print("| constant | value | situation | goodput | mean latency | tells |\n|---|---|---|---|---|---|", flush=True)
    kept: list[dict[str, Any]] = []
    for constant in args.only.split(","):
        usual = getattr(affinity, constant)
        for factor in (0.5, 2.0):
            value = usual * factor
            value = max(1, math.ceil(value)) if constant in WHOLE else value
            setattr(affinity, constant, value)
            after = [run(words) for _, words in runs]
            setattr(affinity, constant, usual)
            for kind in dict.fromkeys(name for name, _ in runs):
                pairs = [(b, a) for (name, b), a in zip(before, after, strict=True) if name == kind]
                ratios = {key: [a[key] / b[key] for b, a in pairs] for key in ("goodput", "latency")}
                tells = any(abs(statistics.mean(each) - 1) > TELLS for each in ratios.values())
                cells = [f"{statistics.mean(r):.3f} ({min(r):.3f}..{max(r):.3f})" for r in ratios.values()]
                cells = [constant, f"{usual:g} -> {value:g}", kind, *cells, "yes" if tells else "no"]
                print(f"| {' | '.join(cells)} |", flush=True)
                kept.append({"constant": constant, "value": value, "situation": kind, **ratios})
    if args.json is not None:
        args.json.write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
