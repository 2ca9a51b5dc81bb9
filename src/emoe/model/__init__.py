"""Binding to transformers: `load` gives a transformers model whose experts live inside a byte budget."""

from emoe.model.bind import Loaded, close, label_task, load
from emoe.model.quantising import quantise
from emoe.model.report import stats

__all__ = ["Loaded", "close", "label_task", "load", "quantise", "stats"]
