"""What a comparison of peers is asked to do, and the rows that follow from it. Plain data, no torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from emoe.bench.cores import Cores, cores_for
from emoe.bench.settings import Contender
from emoe.config import MODES, ExpertMemory, Mode, parse_bytes
from emoe.errors import UsageError
from emoe.policies.foresight import Foresight

PEERS = ("emoe", "transformers", "accelerate", "airllm", "llama.cpp")
LLAMA_PRECISIONS = {"native": "native", "int8": "q8_0", "int4": "q4_0"}
"""The GGUF dtype of experts that stands beside each of emoe's."""

NO_LIMIT = "none"

LoadMode = Literal["mmap", "none"]
LLAMA_EXPERT_BYTES = {"int8": 34 / 32, "int4": 18 / 32}
"""Bytes of one weight in them: blocks of 32 with a scale of two bytes (ggml's Q8_0 and Q4_0)."""
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """What one process may take, as asked ("40%", "8GiB", "none") and in bytes; None: no limit."""

    text: str
    nbytes: int | None

    @property
    def where(self) -> str:
        """For sentences."""
        return "without a memory limit" if self.nbytes is None else f"at {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersSettings:
    """One run of `emoe bench peers`.

    `memory_limits`: of each process, one after the other: "40%" of the checkpoint's bytes, a size, or "none". `budgets`
    of emoe; empty: the largest that the planner fits into the limit. `cores` that processes are pinned to, the first of
    them as many as threads; None: not pinned. `cold` drops files from the page cache before a process starts also
    without a limit; with one it always happens. `warmups` prompts are read before the measured one. `timeout_s` bounds
    loading and the prompt, each; `decode_s` bounds decoding: what is measured then is fewer tokens. `out` keeps what
    was measured. Each of `evictions` gives a row of emoe's for each budget and mode (none: its default); those that
    learn do so beforehand from `history`, a trace of other prompts.
    """

    folder: Path
    cache: Path
    memory_limits: tuple[str, ...] = ("40%",)
    prefill: int = 512
    decode: int = 32
    rounds: int = 2
    threads: tuple[int, ...] = (1, 2)
    peers: tuple[str, ...] = PEERS
    modes: tuple[Mode, ...] = ("exact", "resident")
    evictions: tuple[str, ...] = ()
    history: str | None = None
    budgets: tuple[ExpertMemory, ...] = ()
    expert_dtypes: tuple[str, ...] = ("native",)
    implementations: tuple[str, ...] = ("grouped_mm",)
    cores: Cores | None = None
    cold: bool = False
    warmups: int = 1
    check_routes: bool = False
    timeout_s: float = 600.0
    decode_s: float = 60.0
    out: Path | None = None

    def __post_init__(self) -> None:
        """Check. Raises UsageError."""
        for name, least in (
            ("prefill", 1),
            ("decode", 2),
            ("rounds", 1),
            ("warmups", 0),
            ("timeout_s", 1),
            ("decode_s", 1),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"{name.replace('_s', '')} must be at least {least}, not {getattr(self, name)}")
        for name, known in (("peers", PEERS), ("modes", MODES), ("expert_dtypes", tuple(LLAMA_PRECISIONS))):
            wrong = [value for value in getattr(self, name) if value not in known]
            if wrong or not getattr(self, name):
                found = repr(wrong[0]) if wrong else "nothing"
                raise UsageError(f"{name.replace('_', ' ')} are among {', '.join(known)}, not {found}")
        if not self.memory_limits:
            raise UsageError("memory limits: give at least one, or none")
        for rule in self.evictions:
            Foresight(eviction=rule)  # refuses a name that no rule has
        if not self.threads or min(self.threads) < 1:
            raise UsageError(f"threads must be numbers from 1, not {self.threads}")

    def limits(self, checkpoint_bytes: int) -> tuple[MemoryLimit, ...]:
        """The memory limits. Raises UsageError for a text that is neither a share nor a size."""
        found = []
        for text in self.memory_limits:
            share = _PERCENT.fullmatch(text)
            if text == NO_LIMIT:
                found.append(MemoryLimit(text, None))
            elif share is not None:
                found.append(MemoryLimit(text.strip(), int(checkpoint_bytes * float(share[1]) / 100)))
            else:
                found.append(MemoryLimit(text, parse_bytes(text)))
        return tuple(dict.fromkeys(found))

    def conditions(self) -> dict[str, Any]:
        """For JSON: what every row has in common. Rows measured under other conditions are no match."""
        rows = ("memory_limits", "rounds", "threads", "peers", "modes", "evictions", "budgets")
        chosen = (*rows, "expert_dtypes", "implementations")
        places = ("folder", "cache", "check_routes", "timeout_s", "out")
        return {name: value for name, value in self.as_dict().items() if name not in (*chosen, *places)}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        paths = {name: value for name in ("folder", "cache", "out") if (value := getattr(self, name)) is not None}
        values = asdict(self) | {name: str(path) for name, path in paths.items()}
        values["budgets"] = [str(budget) for budget in self.budgets]
        return values


@dataclass(frozen=True, slots=True)
class Entry:
    """A row: one engine in one configuration with a number of threads.

    `command` is what a user would write for the same. `missing` says why it cannot be measured here. One of
    `contender` (run by this Python) and `llama` (run by the cached build) is set. `cores` are those that the process is
    pinned to; None: not pinned.
    """

    peer: str
    how: str
    precision: str
    threads: int
    command: str
    contender: Contender | None = None
    llama: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    missing: str | None = None
    cores: Cores | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        own = LLAMA_PRECISIONS[self.precision].upper() if self.peer == "llama.cpp" else self.precision
        dtype = "" if self.precision == "native" else f" {own}"
        return f"{self.peer} {self.how}{dtype} -t {self.threads}".replace("  ", " ")


def entries(
    settings: PeersSettings,
    *,
    budgets: dict[str, tuple[ExpertMemory, ...]],
    cpu_bytes: int,
    llama_python: Path | None,
    ggufs: dict[str, Path | str],
    airllm: bool,
    accelerate: bool,
    llama_resident: dict[str, bool],
) -> list[Entry]:
    """The rows, emoe's first.

    Args:
        settings: what is asked.
        budgets: of emoe, by expert dtype.
        cpu_bytes: what accelerate may keep in memory.
        llama_python: the Python with llama.cpp, None where it was not built.
        ggufs: by expert dtype: the file, or why there is none.
        airllm: whether it can be imported here.
        accelerate: whether it can be imported here.
        llama_resident: by expert dtype: whether the file fits into the memory limit as a whole.
    """
    made: list[Entry] = []
    for threads in settings.threads:
        for peer in settings.peers:
            if peer == "emoe":
                made += [
                    entry for dtype in settings.expert_dtypes for entry in _emoe(settings, dtype, budgets, threads)
                ]
            elif peer == "llama.cpp":
                for dtype in settings.expert_dtypes:
                    made += _llama(settings, dtype, llama_python, ggufs[dtype], llama_resident[dtype], threads)
            elif "native" in settings.expert_dtypes:
                made += _python(settings, peer, threads, cpu_bytes, {"airllm": airllm, "accelerate": accelerate})
    placed = [replace(entry, cores=cores_for(entry.threads, settings.cores)) for entry in made]
    return sorted(placed, key=lambda entry: settings.peers.index(entry.peer))


def _emoe(
    settings: PeersSettings, dtype: str, budgets: dict[str, tuple[ExpertMemory, ...]], threads: int
) -> list[Entry]:
    made = []
    for budget in budgets[dtype]:
        everything = budget.kind == "share" and budget.value == 1
        rules = (None,) if everything else settings.evictions or (None,)
        for mode, rule in product(settings.modes[:1] if everything else settings.modes, rules):
            options = {} if dtype == "native" else {"expert_dtype": dtype}
            choices = options if rule is None else options | {"eviction": rule}
            extra = "".join(f', {name}="{value}"' for name, value in choices.items())
            made.append(
                Entry(
                    "emoe",
                    f"{mode} {budget}" if rule is None else f"{mode} {budget} {rule}",
                    dtype,
                    threads,
                    f'emoe.load("{settings.folder}", expert_memory="{budget}", mode="{mode}"{extra})',
                    contender=Contender("emoe", budget, mode, eviction=rule),
                    options=options,
                )
            )
    return made


def _python(
    settings: PeersSettings, peer: str, threads: int, cpu_bytes: int, installed: dict[str, bool]
) -> list[Entry]:
    load = f'AutoModelForCausalLM.from_pretrained("{settings.folder}", dtype="auto"'
    if peer == "transformers":
        return [
            Entry(
                peer,
                name,
                "native",
                threads,
                f'{load}, experts_implementation="{name}")',
                contender=Contender("transformers", implementation=name),
            )
            for name in settings.implementations
        ]
    missing = None if installed[peer] else f"not installed: pip install {peer}"
    if peer == "accelerate":
        command = f'{load}, device_map="auto", max_memory={{"cpu": {cpu_bytes}}}, offload_folder=...)'
        return [
            Entry(
                peer,
                "disk",
                "native",
                threads,
                command,
                contender=Contender("accelerate"),
                options={"cpu_bytes": cpu_bytes},
                missing=missing,
            )
        ]
    command = f'airllm.AirLLMBaseModel("{settings.folder}", device="cpu", layer_shards_saving_path=...)'
    return [Entry(peer, "", "native", threads, command, contender=Contender("airllm"), missing=missing)]


def _llama(
    settings: PeersSettings, dtype: str, python: Path | None, gguf: Path | str, fits: bool, threads: int
) -> list[Entry]:
    """With mmap the kernel brings what is needed and drops what is not; without it everything is read at once, and
    may be rearranged for the processor, so that is the other row where everything fits."""
    made = []
    load_modes: tuple[LoadMode, ...] = ("mmap", "none") if fits else ("mmap",)
    for load_mode in load_modes:
        missing = None
        if python is None:
            missing = f"not installed: emoe bench peers --build-llama-cpp --cache {settings.cache}"
        elif isinstance(gguf, str):
            missing = gguf
        how = "mmap" if load_mode == "mmap" else "no-mmap"
        switches = "--no-repack" if load_mode == "mmap" else "--no-mmap"
        numbers = f"-t {threads} -tb {threads} -c {context(settings)}"
        made.append(
            Entry(
                "llama.cpp",
                how,
                dtype,
                threads,
                f"llama_decode, as llama-cli -m {gguf} {numbers} {switches} -ngl 0",
                llama={
                    "gguf": str(gguf),
                    "threads": threads,
                    "load_mode": load_mode,
                    "repack": load_mode == "none",
                    "context": context(settings),
                },
                missing=missing,
            )
        )
    return made


def context(settings: PeersSettings) -> int:
    """Tokens that a context must hold."""
    return settings.prefill + settings.decode
