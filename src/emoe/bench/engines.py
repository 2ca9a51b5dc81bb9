"""The engines that are measured, each loaded as its users load it. Runs in a worker process."""

from __future__ import annotations

import gc
import importlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from emoe import model as emoe_model
from emoe.bench.feeding import Counters
from emoe.bench.process import memory, reset_peak, storage_bytes_read
from emoe.bench.random_weights import make_checkpoint
from emoe.bench.settings import Contender
from emoe.checkpoint.codecs.formats import NATIVE
from emoe.config import ExpertMemory
from emoe.errors import UnsupportedModelError
from emoe.model.bind import binding_of
from emoe.prediction.registry import SCORERS

CHOICES = ("expert_dtype", "expert_cache", "predictor", "profile", "embeddings")
"""Options that go to `emoe.load` where they are given."""

COUNTED = ("hits", "misses", "loads", "bytes_read", "load_wait_s", "rerouted_tokens", "routed_tokens")
"""Since loading, in the counters of emoe; other engines count nothing."""

AHEAD = {"issued": "ahead_issued", "used": "ahead_used"}
"""Of what emoe loaded ahead, where something does: the engine's name and the counter's."""


@dataclass(slots=True)
class Running:
    """A loaded model. `extra_files` were written for it and hold weights; `notes` are worth telling the user."""

    model: Any
    counters: Callable[[], Counters] = dict
    extra_files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reader: str | None = None
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured generation. Times in seconds, `peak_bytes` resident above `base` of `generate`.

    The `_cpu_s` are processor time of all threads.

    `tokens` are those of the first of `batch` sequences; `checksum`, where given, is of all logits' bits.
    `decode` and `prefill` hold what emoe counted in each phase, `storage_bytes` what the kernel fetched from disk.
    """

    tokens: list[int]
    first_token_s: float
    decode_s: float
    first_token_cpu_s: float
    decode_cpu_s: float
    peak_bytes: int
    storage_bytes: int
    prefill: Counters
    decode: Counters
    step_s: list[float]
    batch: int = 1
    checksum: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def rehearse(contender: Contender, folder: Path, options: dict[str, Any]) -> None:
    """Import the class of the model in `folder`; then load, run and drop a model of less than a MiB in its place.

    Libraries import and set up a good part of themselves when they are first used (25 MiB with torch 2.13): that is
    then no longer mistaken for the model's memory, nor its time for the first token's.
    """
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    if contender.engine == "airllm":
        return  # it may run the model's family and not the tiny model's
    with tempfile.TemporaryDirectory(prefix="emoe-bench-") as scratch:
        tiny = make_checkpoint("tiny", Path(scratch) / "tiny")
        small = {**options, "offload_folder": f"{scratch}/offload", "cpu_bytes": 2**19}
        for name in ("expert_cache", "profile"):  # the tiny model's experts go with it, and other routes
            small.pop(name, None)
        # A budget that suits the model may be too small for this one, whose experts are few.
        budget = contender.expert_memory and ExpertMemory("share", 0.6)
        running = load(replace(contender, expert_memory=budget), tiny, small)
        generate(running, list(range(64)), 8, base_bytes=0)
        running.close()
    del running
    gc.collect()


def load(contender: Contender, folder: Path, options: dict[str, Any]) -> Running:
    """Load `contender`.

    `options`: reader, and `CHOICES` (emoe); an empty offload_folder, cpu_bytes (accelerate); offload_folder, empty or
    AirLLM's from before (airllm).
    """
    if contender.engine == "emoe":
        return _emoe(contender, folder, options)
    if contender.engine == "accelerate":
        return _accelerate(folder, options)
    if contender.engine == "airllm":
        return _airllm(folder, options)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation=contender.implementation)
    return Running(loaded.eval())


def _emoe(contender: Contender, folder: Path, options: dict[str, Any]) -> Running:
    chosen = {name: options[name] for name in CHOICES if options.get(name)}
    if contender.eviction is not None:
        chosen["eviction"] = contender.eviction
    if contender.prefetch is not None:
        chosen["prefetch"] = contender.prefetch
    if contender.eviction not in SCORERS:
        chosen.pop("profile", None)  # it holds what scorers learned
    loaded, _ = emoe_model.load(
        folder,
        expert_memory=contender.expert_memory,
        mode=contender.mode or "exact",
        reader=options["reader"],
        **chosen,
    )

    def counters() -> Counters:
        values = emoe_model.stats(loaded)
        ahead = values["prefetch"]
        counted = {} if ahead is None else {counter: ahead[name] for name, counter in AHEAD.items()}
        return {name: values[name] for name in COUNTED} | counted

    index = binding_of(loaded).index
    return Running(
        loaded,
        counters,
        extra_files=[] if index.expert_dtype == NATIVE else sorted(index.files),
        notes=[emoe_model.stats(loaded)["reader_reason"]],
        reader=emoe_model.stats(loaded)["reader"],
        close=lambda: emoe_model.close(loaded),
    )


def _accelerate(folder: Path, options: dict[str, Any]) -> Running:
    """What accelerate's guide says: `device_map="auto"`, a limit for the CPU, and a folder for the rest."""
    offload = Path(options["offload_folder"])
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map="auto", max_memory={"cpu": options["cpu_bytes"]}, offload_folder=offload
    ).eval()
    places = [str(place) for place in getattr(loaded, "hf_device_map", {}).values()]
    on_disk = places.count("disk")
    if not on_disk:
        raise UnsupportedModelError(f"accelerate put nothing on disk with {options['cpu_bytes']} bytes for the CPU")
    return Running(
        loaded,
        extra_files=sorted(path for path in offload.rglob("*") if path.is_file()),
        notes=[f"accelerate put {on_disk} of {len(places)} modules on disk"],
    )


def _airllm(folder: Path, options: dict[str, Any]) -> Running:
    """What AirLLM's readme says, on the CPU. It copies the checkpoint, cut into layers, to `offload_folder` first."""
    # Optional, and without annotations.
    base: Any = importlib.import_module("airllm").AirLLMBaseModel

    class WithoutTokenizer(base):  # type: ignore[misc]
        """Fed with token ids: a checkpoint without a tokenizer is none of its faults."""

        def get_tokenizer(self, hf_token: str | None = None) -> None:
            return None

    loaded = WithoutTokenizer(str(folder), device="cpu", layer_shards_saving_path=options["offload_folder"])
    return Running(loaded, extra_files=sorted(Path(options["offload_folder"]).rglob("*.safetensors")))


class _Clock:
    """A streamer that notes when each token came, and what was counted until the first."""

    def __init__(self, counters: Callable[[], Counters]) -> None:
        self._counters = counters
        self._prompt_seen = False
        self.times: list[float] = []
        self.at_first: Counters = {}
        self.cpu_at_first = 0.0

    def put(self, value: torch.Tensor) -> None:
        """`generate` calls this with the prompt, then with each token, in CPU memory."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            self.cpu_at_first = time.process_time()
            self.at_first = self._counters()

    def end(self) -> None:
        """`generate` calls this last."""


def generate(running: Running, prompt: list[int], new_tokens: int, base_bytes: int) -> Sample:
    """Generate exactly `new_tokens` greedily after `prompt`, and measure it."""
    ids = torch.tensor([prompt])
    clock = _Clock(running.counters)
    before, read = running.counters(), storage_bytes_read()
    reset_peak()
    start, start_cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        out = running.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
        )
    end_cpu = time.process_time()
    after, first = running.counters(), clock.at_first
    times = clock.times
    return Sample(
        tokens=out[0, len(prompt) :].tolist(),
        first_token_s=times[0] - start,
        decode_s=times[-1] - times[0],
        first_token_cpu_s=clock.cpu_at_first - start_cpu,
        decode_cpu_s=end_cpu - clock.cpu_at_first,
        peak_bytes=memory().peak_bytes - base_bytes,
        storage_bytes=storage_bytes_read() - read,
        prefill={name: first[name] - before[name] for name in before},
        decode={name: after[name] - first[name] for name in before},
        step_s=[round(b - a, 6) for a, b in pairwise(times)],
    )
