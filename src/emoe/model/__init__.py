"""Binding to transformers: `load` gives a transformers model whose experts live inside a byte budget."""

from emoe.model.bind import Loaded, close, load
from emoe.model.report import stats

__all__ = ["Loaded", "close", "load", "stats"]
