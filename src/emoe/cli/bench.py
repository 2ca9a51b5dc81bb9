"""`emoe bench`: the benchmarks bring their own options."""

from __future__ import annotations

from typing import Any

from emoe.bench import commands as benchmarks
from emoe.bench.peers import commands as peers
from emoe.bench.serve import commands as serving
from emoe.cli import bench_plant, bench_reach
from emoe.cli.options import add_command


def add_parser(commands: Any) -> None:
    """Add the command and, below it, one for each benchmark and what they need."""
    parser = commands.add_parser("bench", help="Measure.", description="Measure.")
    below = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    benchmarks.add_decode(add_command(below, "decode", benchmarks.run_decode, benchmarks.DECODE))
    benchmarks.add_replay(add_command(below, "replay", benchmarks.run_decode, benchmarks.REPLAY))
    benchmarks.add_checkpoint(add_command(below, "checkpoint", benchmarks.run_checkpoint, benchmarks.CHECKPOINT))
    serving.add_serve(add_command(below, "serve", serving.run_serve, serving.SERVE))
    bench_plant.add_parser(below)
    bench_reach.add_parser(below)
    peers.add_peers(add_command(below, "peers", peers.run_peers, peers.PEERS_HELP))
