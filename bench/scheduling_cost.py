"""What asking a scheduler takes: microseconds for many waiting and a full house but one.

    python -m bench.scheduling_cost [--waiting 1000] [--running 31]

emoe-nano's profile, 40 % of the experts resident. The median of asking again and again (some requests have come and
gone between two times), and the longest; `core` included: limits, priorities, patience.
"""

from __future__ import annotations

import argparse
import random
import time
from importlib.resources import as_file, files

import numpy as np

from emoe.scheduling.core import admit
from emoe.scheduling.costs import CostModel
from emoe.scheduling.protocol import Request, Situation
from emoe.scheduling.registry import SCHEDULERS, make_scheduler
from emoe.tasks.profile import Profile


def request(number: int, now_s: float, profile: Profile, drawn: random.Random, running: bool) -> Request:
    """One request of a random task; nine of ten waiting ones have a target that Equation 3 cannot keep."""
    task = drawn.choice(profile.tasks)
    lengths = profile.lengths_of(task)
    made = Request(
        id=str(number),
        arrived_s=now_s - drawn.random() * 5,
        input_tokens=drawn.randrange(20, 400),
        max_tokens=512,
        expected_tokens=lengths.mean if lengths is not None else 50.0,
        task=task,
        ttft_slo_s=2.0,
        tpot_slo_s=20.0 if running or drawn.random() < 0.1 else 0.001,
    )
    if running:
        made.admitted_s = made.first_token_s = made.arrived_s
        made.computed_tokens, made.output_tokens = made.input_tokens, drawn.randrange(1, 60)
    return made


def main() -> None:
    """Print a line for each scheduler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--running", type=int, default=31)
    parser.add_argument("--times", type=int, default=200)
    args = parser.parse_args()
    with as_file(files("emoe.nano") / "profile") as folder:
        profile = Profile.read(folder)
    rng = np.random.default_rng(0)
    resident = rng.random((profile.shape.layers, profile.shape.experts)) < 0.4
    print(f"{args.waiting} waiting, {args.running} running of {args.running + 1}")
    for name in SCHEDULERS:
        drawn = random.Random(0)
        scheduler = make_scheduler(name)
        costs = CostModel(
            profile.shape,
            profile.popularity_of,
            lambda: resident,
            step_s=0.003,
            token_s=0.0006,
            prefill_token_s=0.0002,
            expert_load_s=0.004,
        )
        waiting = sorted(
            (request(n, 0.0, profile, drawn, False) for n in range(args.waiting)), key=lambda each: each.arrived_s
        )
        running = [request(10**6 + n, 0.0, profile, drawn, True) for n in range(args.running)]
        taken, spent = 0, []
        for time_no in range(args.times):
            situation = Situation(time_no * 0.05, waiting, running, args.running + 1, 10**6, 10**6, costs)
            start = time.perf_counter()
            admitted = admit(scheduler, situation)
            spent.append(time.perf_counter() - start)
            taken += len(admitted)
            gone = {id(each) for each in admitted}
            waiting = [each for each in waiting if id(each) not in gone]
            waiting += [
                request(2 * 10**6 + time_no * 8 + n, time_no * 0.05, profile, drawn, False) for n in range(len(gone))
            ]
            if time_no % 4 == 0:
                running = [*running[1:], request(3 * 10**6 + time_no, time_no * 0.05, profile, drawn, True)]
        spent = sorted(spent[1:])
        median, longest = spent[len(spent) // 2] * 1e6, spent[-1] * 1e6
        print(f"{name:9} {median:7.0f} us  longest {longest:7.0f} us  {taken} admitted")


if __name__ == "__main__":
    main()
