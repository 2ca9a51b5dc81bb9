"""What is measured, from the options."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emoe.bench.peers.commands import add_peers, peers_settings
from emoe.bench.peers.entries import Entry, MemoryLimit, PeersSettings, entries
from emoe.config import ExpertMemory
from emoe.errors import UsageError

HALF, ALL = ExpertMemory("share", 0.5), ExpertMemory("share", 1.0)


def settings_of(tmp_path: Path, *words: str) -> PeersSettings:
    parser = argparse.ArgumentParser()
    add_peers(parser)
    return peers_settings(parser.parse_args([str(tmp_path), "--cache", str(tmp_path / "cache"), *words]))


def entries_of(settings: PeersSettings, **changes: Any) -> list[Entry]:
    usual: dict[str, Any] = {
        "budgets": {dtype: (HALF,) for dtype in settings.expert_dtypes},
        "cpu_bytes": 1000,
        "llama_python": Path("/llama/python"),
        "ggufs": {dtype: Path(f"/x-{dtype}.gguf") for dtype in settings.expert_dtypes},
        "airllm": True,
        "accelerate": True,
        "llama_resident": dict.fromkeys(settings.expert_dtypes, False),
    }
    return entries(settings, **(usual | changes))


def test_every_peer_at_every_number_of_threads(tmp_path: Path) -> None:
    made = entries_of(settings_of(tmp_path))
    assert [entry.name for entry in made] == [
        "emoe exact 50% -t 1",
        "emoe resident 50% -t 1",
        "emoe exact 50% -t 2",
        "emoe resident 50% -t 2",
        "transformers grouped_mm -t 1",
        "transformers grouped_mm -t 2",
        "accelerate disk -t 1",
        "accelerate disk -t 2",
        "airllm -t 1",
        "airllm -t 2",
        "llama.cpp mmap -t 1",
        "llama.cpp mmap -t 2",
    ]
    assert not [entry for entry in made if entry.missing]
    assert all((entry.contender is None) != (entry.llama is None) for entry in made)
    assert made[-1].llama == {
        "gguf": "/x-native.gguf",
        "threads": 2,
        "load_mode": "mmap",
        "repack": False,
        "context": 544,
    }
    assert 'max_memory={"cpu": 1000}' in made[6].command


def test_each_eviction_rule_of_emoe_is_a_row(tmp_path: Path) -> None:
    settings = settings_of(
        tmp_path,
        "--peers",
        "emoe",
        "--threads",
        "1",
        "--modes",
        "exact",
        "--eviction",
        "lru,next-use",
        "--history",
        "t",
    )
    assert settings.history == "t"
    made = entries_of(settings)
    assert [entry.name for entry in made] == ["emoe exact 50% lru -t 1", "emoe exact 50% next-use -t 1"]
    assert made[1].command.endswith('expert_memory="50%", mode="exact", eviction="next-use")')
    assert [entry.contender and entry.contender.eviction for entry in made] == ["lru", "next-use"]
    everything = entries_of(settings, budgets={"native": (ALL,)})
    assert [entry.name for entry in everything] == ["emoe exact 100% -t 1"]


def test_what_is_not_installed_says_how(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "--threads", "1")
    made = {e.peer: e for e in entries_of(settings, llama_python=None, airllm=False, accelerate=False)}
    assert made["airllm"].missing == "not installed: pip install airllm"
    assert made["accelerate"].missing == "not installed: pip install accelerate"
    assert (
        made["llama.cpp"].missing == f"not installed: emoe bench peers --build-llama-cpp --cache {tmp_path / 'cache'}"
    )
    assert made["emoe"].missing is None
    no_file = entries_of(settings, ggufs={"native": "no GGUF: gguf is not installed"})
    assert no_file[-1].missing == "no GGUF: gguf is not installed"


def test_without_mmap_only_where_everything_fits_and_modes_only_where_not(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "--threads", "1", "--peers", "emoe,llama.cpp", "--memory-limit", "none")
    made = entries_of(settings, budgets={"native": (ALL,)}, llama_resident={"native": True})
    assert [entry.name for entry in made] == ["emoe exact 100% -t 1", "llama.cpp mmap -t 1", "llama.cpp no-mmap -t 1"]
    assert made[-1].llama is not None
    assert made[-1].llama["repack"] is True


def test_quantised_experts_stand_beside_quantised_experts(tmp_path: Path) -> None:
    made = entries_of(settings_of(tmp_path, "--threads", "1", "--modes", "exact", "--expert-dtypes", "int8,int4"))
    assert [(entry.name, entry.precision) for entry in made] == [
        ("emoe exact 50% int8 -t 1", "int8"),
        ("emoe exact 50% int4 -t 1", "int4"),
        ("llama.cpp mmap Q8_0 -t 1", "int8"),
        ("llama.cpp mmap Q4_0 -t 1", "int4"),
    ]
    assert made[1].options == {"expert_dtype": "int4"}


def test_limits_are_shares_sizes_or_none(tmp_path: Path) -> None:
    assert settings_of(tmp_path).limits(1000) == (MemoryLimit("40%", 400),)
    several = settings_of(tmp_path, "--memory-limit", "20%, 2KiB,none,20%").limits(1000)
    assert [(limit.text, limit.nbytes) for limit in several] == [("20%", 200), ("2KiB", 2048), ("none", None)]
    with pytest.raises(UsageError, match="lots"):
        settings_of(tmp_path, "--memory-limit", "lots").limits(1000)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--peers", "emoe,vllm"), "peers are among emoe, transformers, accelerate, airllm, llama.cpp, not 'vllm'"),
        (("--peers", ""), "not nothing"),
        (("--modes", "fast"), "no mode is called 'fast'"),
        (("--expert-dtypes", "fp8"), "expert dtypes are among native, int8, int4, not 'fp8'"),
        (("--threads", "one"), "threads must be numbers, as 1,2, not 'one'"),
        (("--threads", "0"), "threads must be numbers from 1"),
        (("--decode", "1"), "decode must be at least 2, not 1"),
        (("--rounds", "0"), "rounds must be at least 1, not 0"),
        (("--warmups", "-1"), "warmups must be at least 0, not -1"),
        (("--cores", "first"), "cores are auto, none or numbers, as 0,1, not 'first'"),
        (("--cores", "100000"), "cores are auto, none or among .*, not '100000'"),
        (("--eviction", "lru,fifo"), "no eviction rule is called 'fifo'"),
        (("--memory-limit", ","), "memory limits: give at least one, or none"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        settings_of(tmp_path, *words)


def test_a_folder_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        settings_of(tmp_path / "nowhere")
    parser = argparse.ArgumentParser()
    add_peers(parser)
    with pytest.raises(UsageError, match="name the checkpoint's folder"):
        peers_settings(parser.parse_args([]))


def test_every_engine_has_the_same_cores_as_many_as_threads(tmp_path: Path) -> None:
    settings = replace(settings_of(tmp_path), cores=(4, 6, 7))
    assert {entry.threads: entry.cores for entry in entries_of(settings)} == {1: (4,), 2: (4, 6)}
    assert len({(entry.threads, entry.cores) for entry in entries_of(settings)}) == 2
    free = settings_of(tmp_path, "--cores", "none")
    assert {entry.cores for entry in entries_of(free)} == {None}


def test_what_selects_rows_is_no_condition_of_theirs(tmp_path: Path) -> None:
    """A file of measurements can be gone on with for more rows, not under other conditions."""
    usual = settings_of(tmp_path)
    more = settings_of(
        tmp_path, "--memory-limit", "20%", "--rounds", "9", "--threads", "1", "--out", "x", "--modes", "exact"
    )
    assert more.conditions() == usual.conditions()
    for words in (("--prefill", "9"), ("--decode", "9"), ("--warmups", "0"), ("--cold",), ("--decode-seconds", "9")):
        assert settings_of(tmp_path, *words).conditions() != usual.conditions()
