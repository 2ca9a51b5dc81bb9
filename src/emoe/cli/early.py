"""What headers alone can refuse, before torch is imported: a mistake should not cost ten seconds of imports."""

from __future__ import annotations

import argparse

from emoe import nano
from emoe.checkpoint.codecs.formats import NATIVE, codec_of
from emoe.checkpoint.headers import read_headers
from emoe.checkpoint.settings import read_config
from emoe.checkpoint.source import resolve
from emoe.config import ExpertMemory
from emoe.planner.facts import layer_needs
from emoe.planner.from_headers import facts_from_headers
from emoe.planner.remote import is_hub_id
from emoe.planner.tensors import Unsure
from emoe.policies.foresight import Foresight
from emoe.residency.budget import plan_slots


def refuse_early(model: str | None, expert_memory: ExpertMemory | None, expert_dtype: str = NATIVE) -> None:
    """Raise what loading would raise for damaged files or a budget below the floor.

    What takes more than headers to find out, and hub models, are left to loading.

    Raises:
        UsageError: there is no such folder.
        CheckpointError: files missing, truncated or malformed.
        UnsupportedModelError: pickle files only, or sizes that `expert_dtype` cannot take.
        BudgetError: `expert_memory` is below the floor.
    """
    if model is not None and is_hub_id(model):
        return
    path = nano.path() if model is None else resolve(model)
    config, entries = read_config(path), read_headers(path)
    try:
        facts = facts_from_headers(path, config, entries, codec=codec_of(expert_dtype))
    except Unsure:
        return
    plan_slots(expert_memory, layer_needs(facts))


def refuse_settings(args: argparse.Namespace) -> None:
    """Raise what loading would raise for options that contradict each other, or names that nothing has.

    Raises:
        UsageError: with what to change.
    """
    Foresight(
        mode=args.mode,
        eviction=args.eviction,
        predictor=args.predictor,
        prefetch=args.prefetch,
        replan_prompts=args.replan_prompts,
        layer_split=args.layer_split,
        sensitivity_threshold=args.sensitivity_threshold,
        profiled=args.profile is not None or (args.model is None and nano.profile_path().is_dir()),
    )
