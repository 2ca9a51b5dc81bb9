"""Does emoe predict its own speed? Predicted against measured, contender by contender, part by part.

    emoe roofline CHECKPOINT -t 1
    emoe bench replay CHECKPOINT --budgets 20,40,60,80 --modes exact --prefill 512 --decode 64 --rounds 1 --threads 1 \\
        --one-at-a-time --reader direct --json > replay.json
    python bench/predicted.py CHECKPOINT replay.json [--link direct]

"counted" takes the misses that the benchmark counted, so it checks the arithmetic of time alone; which share of them is
waited for behind one another is the planner's. "replayed" takes the
planner's own misses of the same tokens after the same prompts (a planted checkpoint's trace), as `emoe plan` does; the
misses a token are printed beside those counted. Computing and waiting are the parts of a token: predicted, and as
measured (what is not waiting). Also prints the limit, and the share of it reached.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from emoe.cli.routes import TRACE_TOKENS, trace_of
from emoe.config import ExpertMemory
from emoe.planner import Facts, facts_of
from emoe.profiling.kept import known, layout_of
from emoe.profiling.machine import Machine
from emoe.profiling.roofline import ModelWork, floor
from emoe.profiling.speed import Speed, expected
from emoe.routing.trace import Trace
from emoe.simulation.missing import AfterPrompt, after_prompt, like_model


def replayed(facts: Facts, trace: Trace, values: dict[str, Any], memory: ExpertMemory) -> AfterPrompt:
    """The planner's misses of the windows that a replay fed."""
    settings, layers = values["settings"], facts.expert_layers
    return after_prompt(
        like_model(trace, len(layers), max(layer.experts for layer in layers), facts.top_k),
        memory.value,
        int(settings["prompt_tokens"]),
        int(settings["new_tokens"]) - 1,
        windows=int(settings["rounds"]),
        before=int(settings["warmups"]),
        expert_bytes=max(layer.expert_nbytes for layer in layers),
        ends_in_experts=ModelWork(facts).ends_in_experts,
    )


def speeds(
    facts: Facts, machine: Machine, values: dict[str, Any], each: dict[str, Any], found: AfterPrompt | None, link: Any
) -> tuple[Speed, Speed | None, float]:
    """With the misses of one contender as counted, with the planner's, and the missing share counted."""
    prompt, threads = int(values["settings"]["prompt_tokens"]), int(values["threads"][0])
    samples = each["samples"]
    decoded = [sample["decode"] for sample in samples]
    looked_up = sum(one["hits"] + one["misses"] for one in decoded)
    rate = sum(one["misses"] for one in decoded) / looked_up
    common: dict[str, Any] = {
        "prompt_tokens": prompt,
        "context": prompt,
        "waiting": None if found is None else found.waiting,
        "link": link,
        "model": machine.models.get(layout_of(facts.path), {}).get(threads),
    }
    engine = machine.engine[threads]
    read = sum(sample["prefill"]["bytes_read"] for sample in samples) / len(samples)
    counted = expected(facts, machine, engine, miss_rate=rate, prompt_missed_bytes=read, **common)
    if found is None:
        return counted, None, rate
    nbytes = sum(n * layer.expert_nbytes for n, layer in zip(found.prompt_loads, facts.expert_layers, strict=True))
    own = expected(facts, machine, engine, miss_rate=found.miss_rate, prompt_missed_bytes=nbytes, **common)
    return counted, own, rate


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("results")
    parser.add_argument("--link", default="direct", choices=("direct", "cached"))
    args = parser.parse_args()
    _, facts = facts_of(args.model)
    machine = known(sorted(facts.path.glob("*.safetensors")))
    values = json.loads(Path(args.results).read_text())
    threads = int(values["threads"][0])
    if machine is None or threads not in machine.engine:
        parser.error(f"measure this machine first: emoe roofline {args.model} -t {threads}")
    trace, told = trace_of(None, TRACE_TOKENS, facts.path)
    work = ModelWork(facts)
    print(f"routes: {told}; seconds of a token in ms")
    for each in values["contenders"]:
        if each["engine"] != "emoe" or each["mode"] != "exact" or not each["samples"]:
            continue
        memory = ExpertMemory.parse(each["expert_memory"] or "100%")
        found = None
        if trace is not None and memory.kind == "share" and memory.value < 1:
            found = replayed(facts, trace, values, memory)
        counted, own, missed = speeds(facts, machine, values, each, found, args.link)
        steps = sum(len(sample["tokens"]) - 1 for sample in each["samples"])
        token_s = sum(sample["decode_s"] for sample in each["samples"]) / steps
        waited_s = sum(sample["decode"]["load_wait_s"] for sample in each["samples"]) / steps
        first = each["first_token_s"]["median"]
        limit = floor(work.token(missed, int(values["settings"]["prompt_tokens"])), machine, threads, args.link)
        misses = f"{missed * work.routed_experts:.2f}"
        if found is not None:
            misses += f" (planner {found.miss_rate * work.routed_experts:.2f})"
        print(f"{each['name']}: misses a token {misses}")
        print(
            f"    measured {1 / token_s:6.2f} tok/s, {1e3 * token_s:6.1f} ms = {1e3 * (token_s - waited_s):.1f} "
            f"computing + {1e3 * waited_s:.1f} waiting; first token {first:.2f} s; {limit.share(token_s):.0%} of the "
            f"limit ({limit.bound_by}); peak {each['peak_bytes'] / each['plan_bytes'] - 1:+.1%} over plan"
        )
        for name, speed in (("counted", counted), ("replayed", own)):
            if speed is None:
                continue
            added = speed.load_s - speed.overlap_s
            print(
                f"    {name:8} {speed.tokens_per_s:6.2f} ({speed.tokens_per_s * token_s - 1:+5.1%}) "
                f"{1e3 * speed.token_s:6.1f} ms = {1e3 * speed.memory_s:.1f} memory + {1e3 * speed.overhead_s:.1f} "
                f"overhead + {1e3 * added:.1f} misses ({1e3 * speed.load_s:.1f} reading); first token "
                f"{speed.first_token_s:.2f} s ({speed.first_token_s / first - 1:+.0%})"
            )


if __name__ == "__main__":
    main()
