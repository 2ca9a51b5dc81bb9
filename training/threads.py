"""How many threads the next step should use on a machine that others use too.

Two threads that wait for each other after every product run at the pace of the slower: with one of two cores
taken by another process, a step on two threads took over five times as long, on one thread 1.4 times."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch


def busy_seconds() -> float:
    """Processor seconds that the whole machine has used so far, or 0 where /proc does not tell."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, interrupt, soft = map(int, fields[:7])
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


class Threads:
    """Leaves alone as many cores as other processes kept busy during the last steps."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.others = 0.0
        self.mark()

    def mark(self) -> None:
        self.wall, self.own, self.all = time.monotonic(), time.process_time(), busy_seconds()

    def adapt(self) -> int:
        wall, own, everything = self.wall, self.own, self.all
        self.mark()
        span = max(1e-3, self.wall - wall)
        others = max(0.0, (self.all - everything - (self.own - own)) / span)
        self.others = 0.5 * self.others + 0.5 * others
        count = max(1, min(self.most, round(self.most - self.others + 0.1)))
        if count != torch.get_num_threads():
            torch.set_num_threads(count)
        return count
