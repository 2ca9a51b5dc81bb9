"""The options of `emoe bench`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest

from emoe.bench.commands import add_checkpoint, add_decode, decode_settings
from emoe.bench.settings import DecodeSettings
from emoe.config import ExpertMemory
from emoe.errors import BudgetError, UsageError
from emoe.planner import plan


def settings_of(*words: str) -> DecodeSettings:
    parser = argparse.ArgumentParser()
    add_decode(parser)
    return decode_settings(parser.parse_args(words))


def test_without_options_the_defaults_are_those_of_the_settings() -> None:
    assert settings_of() == DecodeSettings()


def test_every_option_reaches_the_settings() -> None:
    found = settings_of(
        *shlex.split(
            "m --budgets 80,2/layer --modes exact --baselines none --prompt-tokens 5 --new-tokens 6 --rounds 7 "
            "--warmups 0 --threads 2 --memory-limit 1700MiB --cold --reader direct --eviction lru,next-use --seed 9 "
            "--history t.npz --one-at-a-time --offload-folder /somewhere --against 'emoe exact 80% lru'"
        )
    )
    assert found == DecodeSettings(
        model="m",
        budgets=(ExpertMemory("share", 0.8), ExpertMemory("per_layer", 2)),
        modes=("exact",),
        baselines=(),
        prompt_tokens=5,
        new_tokens=6,
        rounds=7,
        warmups=0,
        threads=2,
        memory_limit=1700 * 2**20,
        cold=True,
        reader="direct",
        evictions=("lru", "next-use"),
        history="t.npz",
        seed=9,
        one_at_a_time=True,
        offload_folder="/somewhere",
        baseline="emoe exact 80% lru",
    )


def test_an_unknown_eviction_rule_is_named_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="no eviction rule is called 'newest'"):
        settings_of("--eviction", "lru,newest")


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(UsageError, match="no mode is called 'fast'; use exact, balanced, resident"):
        settings_of("--modes", "exact,fast")


def test_help_can_be_shown() -> None:
    parser = argparse.ArgumentParser()
    add_decode(parser)
    assert "100%,60%,40%,20%" in parser.format_help()


def test_a_checkpoint_is_written_and_its_folder_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_checkpoint(parser)
    args = parser.parse_args(["tiny", str(tmp_path / "x")])
    assert args.run(args) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x'}\n"
    assert (tmp_path / "x" / "config.json").exists()


def test_the_budget_fit_is_what_the_memory_limit_leaves() -> None:
    words = ("--budgets", "fit", "--modes", "exact", "--prompt-tokens", "64", "--new-tokens", "8")
    [budget] = settings_of(*words, "--memory-limit", "415MiB").budgets
    made = plan(memory=int(415 * 2**20 / 1.03), context=72, prompt=64)
    assert budget == ExpertMemory("bytes", made.budget_bytes >> 20 << 20)
    assert made.fit == "some"
    with pytest.raises(UsageError, match="fit is what --memory-limit leaves"):
        settings_of(*words)
    with pytest.raises(
        BudgetError, match=r"a memory limit of 300\.00 MiB is less than emoe-nano needs; give at least 4\d\d"
    ):
        settings_of(*words, "--memory-limit", "300MiB")
