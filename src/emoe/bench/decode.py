"""`emoe bench decode`: decoding speed at several budgets and modes, beside transformers and accelerate.

Every contender is loaded in a process of its own, so that its peak memory is its own. Where all of them fit into
memory together they stay loaded, and each round asks them for one generation one after the other while the others
sleep: what disturbs the machine then disturbs all alike. Otherwise (or with a memory limit) they take turns, one
process at a time, twice around.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe.bench.cgroup import MemoryCgroup, memory_cgroup
from emoe.bench.client import WorkerClient, WorkerError
from emoe.bench.learning import learned
from emoe.bench.limits import Limits, limits_of, machine_of
from emoe.bench.page_cache import drop
from emoe.bench.plant.card import is_planted, read_card
from emoe.bench.results import DecodeReport, Outcome, decode_rate
from emoe.bench.settings import Contender, DecodeSettings
from emoe.checkpoint.codecs.formats import NATIVE
from emoe.checkpoint.memory_room import memory_room
from emoe.checkpoint.source import resolve
from emoe.config import Embeddings, ExpertMemory, format_bytes
from emoe.errors import UsageError
from emoe.planner import Plan, facts_of, plan

Say = Callable[[str], None]

LOADING = ("reader", "expert_dtype", "expert_cache", "predictor", "embeddings")
"""Settings that say how emoe loads."""

FREE_SHARE = 0.9
"""Of the memory that is free, what contenders loaded together may take."""

TURNS = 2
"""How often each contender is started when only one process runs at a time: its rounds are split between them."""


def run(settings: DecodeSettings, say: Say = lambda _: None) -> DecodeReport:
    """Measure. `say` is told what happens, one line at a time.

    Raises:
        UsageError: a model, a length or a history that cannot be meant.
        CgroupError: a memory limit is asked for and no cgroup can be made here.
        BudgetError: a budget is below the floor.
        CheckpointError, UnsupportedModelError: the checkpoint is damaged, or no MoE.
    """
    bench = _Bench(settings, say)
    if settings.memory_limit is not None:
        with memory_cgroup(settings.memory_limit):
            pass  # refused here, before anything long
    with learned(bench.folder, settings.history, settings.evictions, say) as bench.profile:
        alternating = bench.fits_together()
        if alternating:
            bench.alternate(range(settings.rounds))
        else:
            half = -(-settings.rounds // TURNS)
            for start in range(0, settings.rounds, half):
                rounds = range(start, min(start + half, settings.rounds))
                for outcome in bench.outcomes:
                    bench.alone(outcome, rounds)
    return bench.report(alternating)


@dataclass(slots=True)
class _Live:
    """A loaded contender."""

    outcome: Outcome
    client: WorkerClient
    extra_files: list[Path]
    cgroup: MemoryCgroup | None


class _Bench:
    def __init__(self, settings: DecodeSettings, say: Say) -> None:
        from emoe import nano

        self.settings = settings
        self.say = say
        self.profile: str | None = None
        card = read_card(settings.model or nano.path()) if settings.forced else None
        self.folder = nano.path() if settings.model is None else resolve(settings.model)
        self.card = read_card(self.folder) if is_planted(self.folder) else card
        self.files = sorted(self.folder.glob("*.safetensors"))
        self.full = self._plan(None)
        self.outcomes = [Outcome(contender, self._plan_bytes(contender)) for contender in settings.contenders]
        self._check_length()

    def _plan(self, memory: ExpertMemory | None, expert_dtype: str = NATIVE, embeddings: Embeddings = "memory") -> Plan:
        return plan(
            self.folder,
            expert_dtype=expert_dtype,
            embeddings=embeddings,
            expert_memory=memory or ExpertMemory("share", 1.0),
            context=self.settings.positions,
            prompt=self.settings.prompt_tokens,
            batch=self.settings.batch,
            chunk=self.settings.chunk,
        )

    def _expert_dtype(self, contender: Contender) -> str:
        return self.settings.expert_dtype if contender.engine == "emoe" else NATIVE

    def _plan_bytes(self, contender: Contender) -> int:
        embeddings: Embeddings = self.settings.embeddings if contender.engine == "emoe" else "memory"
        made = self._plan(contender.expert_memory, self._expert_dtype(contender), embeddings)
        return made.total_bytes - made.import_bytes

    def _check_length(self) -> None:
        from emoe.checkpoint.settings import read_config

        longest = read_config(self.folder).get("max_position_embeddings")
        wanted = self.settings.positions
        if isinstance(longest, int) and wanted > longest:
            raise UsageError(
                f"{self.settings.prompt_tokens} prompt tokens and {self.settings.new_tokens} new ones are more than "
                f"the {longest} positions of {self.full.model}; ask for fewer"
            )

    def fits_together(self) -> bool:
        """Whether all contenders can stay loaded; loading takes transformers twice the model for a moment."""
        if self.settings.memory_limit is not None or self.settings.one_at_a_time or len(self.outcomes) == 1:
            return False
        each = sum(outcome.plan_bytes + self.full.import_bytes for outcome in self.outcomes)
        plain = any(outcome.contender.engine != "emoe" for outcome in self.outcomes)
        peak = each + (self.full.checkpoint_bytes if plain else 0) + self._gathered_bytes()
        # Streamed experts come from the page cache, which must not be squeezed out by the contenders either.
        peak += self.full.checkpoint_bytes
        room = memory_room()
        if peak <= room.available_bytes * FREE_SHARE:
            return True
        self.say(
            f"all contenders together would take {format_bytes(peak)} of the {format_bytes(room.available_bytes)} free "
            f"({room.bound}), so one process runs at a time: drifts of the machine do not cancel out"
        )
        return False

    def _gathered_bytes(self) -> int:
        """What transformers' batched_mm adds while it reads a prompt: a copy of the weights for each token's choice."""
        if not any(outcome.contender.implementation == "batched_mm" for outcome in self.outcomes):
            return 0
        return self.settings.batch * self.settings.prompt_tokens * self.full.top_k * self.full.expert_nbytes

    def alternate(self, rounds: Sequence[int]) -> None:
        """Load all, then measure them in turn, starting each round with another one."""
        with ExitStack() as stack:
            live = []
            for outcome in self.outcomes:
                loaded = stack.enter_context(self._started(outcome))
                if loaded is not None:
                    live.append(loaded)
            for one in list(live):
                if not self._warm_up(one):
                    live.remove(one)
            for number in rounds:
                turn = number % len(live) if live else 0
                for one in [*live[turn:], *live[:turn]]:
                    if not self._measure(one, number):
                        live.remove(one)

    def alone(self, outcome: Outcome, rounds: Sequence[int]) -> None:
        """Start one contender, measure its rounds, end it."""
        if outcome.error is not None:
            return
        with self._started(outcome) as one:
            if one is None or not self._warm_up(one):
                return
            for number in rounds:
                if not self._measure(one, number):
                    return

    @contextmanager
    def _started(self, outcome: Outcome) -> Iterator[_Live | None]:
        """The contender in a process of its own, or None where it could not be loaded (its outcome says why)."""
        settings = self.settings
        if not self._fits(outcome):
            yield None
            return
        with ExitStack() as stack:
            cgroup = None
            if settings.memory_limit is not None:
                cgroup = stack.enter_context(memory_cgroup(settings.memory_limit))
            options: dict[str, Any] = {name: getattr(settings, name) for name in LOADING}
            options["profile"] = self.profile
            if outcome.contender.engine == "accelerate":
                offload = tempfile.mkdtemp(prefix="emoe-bench-", dir=settings.offload_folder)
                stack.callback(shutil.rmtree, offload, ignore_errors=True)
                options |= {"offload_folder": offload, "cpu_bytes": self._cpu_bytes(outcome.contender)}
            if settings.cold:
                drop(self.files)
            client = stack.enter_context(WorkerClient(outcome.name, cgroup, settings.threads))
            try:
                loaded = client.ask(
                    "load",
                    contender=outcome.contender.as_dict(),
                    folder=str(self.folder),
                    threads=settings.threads,
                    options=options,
                )
            except WorkerError as error:
                self._fail(outcome, error)
                yield None
                return
            outcome.loads.append(loaded)
            peak = format_bytes(int(loaded["load_peak_bytes"]))
            self.say(f"{outcome.name}: loaded in {loaded['load_s']:.1f} s, peak {peak}")
            yield _Live(outcome, client, [Path(name) for name in loaded["extra_files"]], cgroup)

    def _fits(self, outcome: Outcome) -> bool:
        """Whether emoe's plan fits into what is free: else the kernel would kill this process, or another one.

        Where several stay loaded `fits_together` has looked at them all; a memory limit harms nobody else.
        """
        if outcome.contender.engine != "emoe" or self.settings.memory_limit is not None:
            return True
        room = memory_room()
        needed = outcome.plan_bytes + self.full.import_bytes
        if needed <= room.available_bytes:
            return True
        outcome.error = (
            f"{outcome.name} needs {format_bytes(needed)} and {format_bytes(room.available_bytes)} are free "
            f"({room.bound}); free some, or ask for a smaller budget, batch or prompt"
        )
        self.say(outcome.error)
        return False

    def _cpu_bytes(self, contender: Contender) -> int:
        """What accelerate may keep in memory: the dense weights, and as many bytes of experts as emoe has."""
        made = self._plan(contender.expert_memory)
        return made.dense_bytes + made.budget_bytes

    def _warm_up(self, one: _Live) -> bool:
        return all(self._generate(one, -1 - n) is not None for n in range(self.settings.warmups))

    def _measure(self, one: _Live, number: int) -> bool:
        sample = self._generate(one, number)
        if sample is None:
            return False
        one.outcome.samples[number] = sample
        if one.cgroup is not None:
            one.outcome.note_peak(one.cgroup.peak_bytes)
        rate = decode_rate(sample)
        self.say(
            f"round {number + 1}/{self.settings.rounds}  {one.outcome.name}: {rate:.2f} tokens/s, first token after "
            f"{sample['first_token_s']:.2f} s"
        )
        return True

    def _generate(self, one: _Live, number: int) -> dict[str, Any] | None:
        """Prompt `number`; those of warm-ups are negative and lie beyond the rounds'."""
        if self.settings.cold:
            one.outcome.note_cached(drop([*self.files, *one.extra_files]))
        try:
            if self.settings.forced:
                return self._replay(one, number)
            return one.client.ask(
                "generate",
                prompt=number if number >= 0 else self.settings.rounds - 1 - number,
                prompt_tokens=self.settings.prompt_tokens,
                new_tokens=self.settings.new_tokens,
                seed=self.settings.seed,
            )
        except WorkerError as error:
            self._fail(one.outcome, error)
            return None

    def _replay(self, one: _Live, number: int) -> dict[str, Any]:
        """Warm-ups begin with the trace's first token, and every later turn where the one before ended."""
        turn = number + self.settings.warmups if number >= 0 else -1 - number
        return one.client.ask(
            "replay",
            start=turn * self.settings.positions,
            prompt_tokens=self.settings.prompt_tokens,
            steps=self.settings.new_tokens - 1,
            batch=self.settings.batch,
            chunk=self.settings.chunk,
        )

    def _fail(self, outcome: Outcome, error: WorkerError) -> None:
        outcome.error = str(error)
        self.say(outcome.error)

    def report(self, alternating: bool) -> DecodeReport:
        """What was found."""
        loads = [load for outcome in self.outcomes for load in outcome.loads]
        full = self.full
        description = (
            f"{full.model_type}, {full.dtype}, {format_bytes(full.checkpoint_bytes)}: {full.layers} layers x "
            f"{full.experts_per_layer} experts of {format_bytes(full.expert_nbytes)}, {full.top_k} per token, "
            f"{format_bytes(full.dense_bytes)} dense"
        )
        return DecodeReport(
            settings=self.settings,
            model={
                "name": "emoe-nano" if self.settings.model is None else self.settings.model,
                "description": description,
                "model_type": full.model_type,
                "dtype": full.dtype,
                "checkpoint_bytes": full.checkpoint_bytes,
                "dense_bytes": full.dense_bytes,
                "expert_bytes": full.expert_bytes,
                "layers": full.layers,
                "experts_per_layer": full.experts_per_layer,
                "top_k": full.top_k,
            },
            machine=machine(),
            alternating=alternating,
            outcomes=self.outcomes,
            versions={name: version for load in loads for name, version in load["versions"].items()},
            threads=sorted({int(load["threads"]) for load in loads}),
            planted=None if self.card is None else self.card.as_dict(),
            limits=self._limits(),
        )

    def _limits(self) -> dict[str, Limits]:
        """The least times of each contender's own work; nothing but those of replays is exactly counted."""
        if not self.settings.forced:
            return {}
        rates = machine_of(self.folder, self.say)
        measured = [outcome for outcome in self.outcomes if outcome.samples]
        dtypes = {self._expert_dtype(outcome.contender) for outcome in measured}
        facts = {dtype: facts_of(self.folder, expert_dtype=dtype)[1] for dtype in dtypes}
        return {o.name: limits_of(o, self.settings, facts[self._expert_dtype(o.contender)], rates) for o in measured}


def machine() -> dict[str, Any]:
    """The processor, how many of it, and the memory."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux: the architecture's name has to do
    return {
        "cpu": name,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
    }
