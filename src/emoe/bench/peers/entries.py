"""What a comparison of peers is asked to do, and the rows that follow from it. Plain data, no torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from emoe.bench.settings import Contender
from emoe.config import MODES, ExpertMemory, Mode, parse_bytes
from emoe.errors import UsageError

PEERS = ("emoe", "transformers", "accelerate", "airllm", "llama.cpp")
LLAMA_PRECISIONS = {"native": "native", "int8": "q8_0", "int4": "q4_0"}
"""The GGUF dtype of experts that stands beside each of emoe's."""

LoadMode = Literal["mmap", "none"]
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersSettings:
    """One run of `emoe bench peers`.

    `memory_limit`: for each process, "40%" of the checkpoint's bytes, a size, or None. `budgets` of emoe; empty: the
    largest that the planner fits into the limit. `cold` drops files from the page cache before a process starts
    also without a limit; with one it always happens. `warmups` prompts are read before the measured one; None: one
    where everything is compared in memory, else none, so that a process that has just started is measured.
    `timeout_s` bounds loading and the prompt, each; `decode_s` bounds decoding: what is measured then is fewer tokens.
    """

    folder: Path
    cache: Path
    memory_limit: str | None = "40%"
    prefill: int = 512
    decode: int = 32
    rounds: int = 2
    threads: tuple[int, ...] = (1, 2)
    peers: tuple[str, ...] = PEERS
    modes: tuple[Mode, ...] = ("exact", "resident")
    budgets: tuple[ExpertMemory, ...] = ()
    expert_dtypes: tuple[str, ...] = ("native",)
    implementations: tuple[str, ...] = ("grouped_mm",)
    cold: bool = False
    warmups: int | None = None
    check_routes: bool = False
    timeout_s: float = 600.0
    decode_s: float = 60.0

    def __post_init__(self) -> None:
        """Check. Raises UsageError."""
        for name, least in (("prefill", 1), ("decode", 2), ("rounds", 1), ("timeout_s", 1), ("decode_s", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name.replace('_s', '')} must be at least {least}, not {getattr(self, name)}")
        for name, known in (("peers", PEERS), ("modes", MODES), ("expert_dtypes", tuple(LLAMA_PRECISIONS))):
            wrong = [value for value in getattr(self, name) if value not in known]
            if wrong or not getattr(self, name):
                found = repr(wrong[0]) if wrong else "nothing"
                raise UsageError(f"{name.replace('_', ' ')} are among {', '.join(known)}, not {found}")
        if self.warmups is not None and self.warmups < 0:
            raise UsageError(f"warmups must be at least 0, not {self.warmups}")
        if not self.threads or min(self.threads) < 1:
            raise UsageError(f"threads must be numbers from 1, not {self.threads}")

    @property
    def prompts_before(self) -> int:
        """How many prompts a process reads before the measured one."""
        if self.warmups is not None:
            return self.warmups
        return 1 if self.memory_limit is None and not self.cold else 0

    def limit_bytes(self, checkpoint_bytes: int) -> int | None:
        """The memory limit. Raises UsageError for a text that is neither a share nor a size."""
        if self.memory_limit is None:
            return None
        share = _PERCENT.fullmatch(self.memory_limit)
        if share is not None:
            return int(checkpoint_bytes * float(share[1]) / 100)
        return parse_bytes(self.memory_limit)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(self) | {"folder": str(self.folder), "cache": str(self.cache)}
        values["budgets"] = [str(budget) for budget in self.budgets]
        return values


@dataclass(frozen=True, slots=True)
class Entry:
    """A row: one engine in one configuration with a number of threads.

    `command` is what a user would write for the same. `missing` says why it cannot be measured here. One of
    `contender` (run by this Python) and `llama` (run by the cached build) is set.
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

    @property
    def name(self) -> str:
        """What tables call it."""
        dtype = "" if self.precision == "native" else f" {self.precision}"
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
    return sorted(made, key=lambda entry: settings.peers.index(entry.peer))


def _emoe(
    settings: PeersSettings, dtype: str, budgets: dict[str, tuple[ExpertMemory, ...]], threads: int
) -> list[Entry]:
    made = []
    for budget in budgets[dtype]:
        everything = budget.kind == "share" and budget.value == 1
        for mode in settings.modes[:1] if everything else settings.modes:
            options = {} if dtype == "native" else {"expert_dtype": dtype}
            extra = "".join(f', {name}="{value}"' for name, value in options.items())
            made.append(
                Entry(
                    "emoe",
                    f"{mode} {budget}",
                    dtype,
                    threads,
                    f'emoe.load("{settings.folder}", expert_memory="{budget}", mode="{mode}"{extra})',
                    contender=Contender("emoe", budget, mode),
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
