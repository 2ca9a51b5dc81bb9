"""Whether Triton can run kernels here: on a GPU, or in its interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import version

import torch


def no_triton() -> str:
    """Why not; empty where it can.

    Triton's interpreter before 3.7 makes whole numbers of arrays of one element, which numpy from 2.4 on refuses.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    triton, numpy = (tuple(map(int, re.findall(r"\d+", version(name))[:2])) for name in ("triton", "numpy"))
    if not torch.cuda.is_available() and triton < (3, 7) and numpy >= (2, 4):
        return "Triton's interpreter before 3.7 does not run with numpy 2.4 or newer"
    return ""
