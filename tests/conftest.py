"""Settings for every test: no network, one thread (so that results repeat), a hypothesis profile."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels then run on the CPU; read when triton is first imported

# Models take a while to build, so there is no deadline; `--hypothesis-profile=thorough` searches longer.
settings.register_profile("emoe", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", parent=settings.get_profile("emoe"), max_examples=1000)
settings.load_profile("emoe")

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """`make_checkpoint(name, **settings)` in a folder of its own, the same one for the same arguments."""
    from tests.families import make_checkpoint

    made: dict[str, Path] = {}

    def get(name: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
        key = f"{name} {dtype} {sorted(settings.items())}"
        if key not in made:
            made[key] = make_checkpoint(name, tmp_path_factory.mktemp(name), dtype=dtype, **settings)
        return made[key]

    return get
