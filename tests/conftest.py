"""Settings for every test: no network, one thread (so that results repeat), a hypothesis profile."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# Models take a while to build, so there is no deadline; `--hypothesis-profile=thorough` searches longer.
settings.register_profile(
    "emoe", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("emoe"), max_examples=1000)
settings.load_profile("emoe")
