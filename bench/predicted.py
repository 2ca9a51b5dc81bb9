"""Does emoe predict its own speed? Predicted against measured, contender by contender.

    emoe roofline CHECKPOINT -t 1
    emoe bench decode CHECKPOINT --budgets 100,60,40,20 --modes exact --baselines none --reader direct --cold -t 1 \\
        --prompt-tokens 512 --json > decode.json            # or emoe bench replay
    python bench/predicted.py CHECKPOINT decode.json [--link direct]

Misses are those that the benchmark counted, so this checks the arithmetic of time alone: bytes over the rates of
emoe's kernels, missed bytes over the link, seconds for each layer. Also prints the limit and the share of it reached.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from emoe.planner import facts_of
from emoe.profiling.machine import known, layout_of
from emoe.profiling.roofline import ModelWork, floor
from emoe.profiling.speed import expected


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("results")
    parser.add_argument("--link", default="direct", choices=("direct", "cached"))
    args = parser.parse_args()
    _, facts = facts_of(args.model)
    machine = known(sorted(facts.path.glob("*.safetensors")))
    results = json.loads(Path(args.results).read_text())
    threads = int(results["threads"][0])
    if machine is None or threads not in machine.engine:
        parser.error(f"measure this machine first: emoe roofline {args.model} -t {threads}")
    prompt = int(results["settings"]["prompt_tokens"])
    print("                        tok/s  predicted         first token s  predicted         of the limit")
    for each in results["contenders"]:
        if each["engine"] != "emoe" or each["mode"] != "exact" or not each["samples"]:
            continue
        steps = len(each["samples"][0]["tokens"]) - 1
        missed = sum(sample["decode"]["bytes_read"] for sample in each["samples"]) / (len(each["samples"]) * steps)
        read = sum(sample["prefill"]["bytes_read"] for sample in each["samples"]) / len(each["samples"])
        work = ModelWork(facts)
        speed = expected(
            facts,
            machine,
            machine.engine[threads],
            miss_rate=missed / work.routed_bytes,
            prompt_tokens=prompt,
            prompt_missed_bytes=read,
            context=prompt,
            link=args.link,
            model=machine.models.get(layout_of(facts.path), {}).get(threads),
        )
        rate, first = each["decode_tokens_per_s"]["median"], each["first_token_s"]["median"]
        limit = floor(work.token(missed / work.routed_bytes, prompt), machine, threads, args.link)
        print(
            f"{each['name']:22} {rate:6.2f}  {speed.tokens_per_s:9.2f} ({speed.tokens_per_s / rate - 1:+5.0%})"
            f"  {first:13.2f}  {speed.first_token_s:9.2f} ({speed.first_token_s / first - 1:+5.0%})"
            f"  {limit.share(1 / rate):11.0%} ({limit.bound_by})"
        )


if __name__ == "__main__":
    main()
