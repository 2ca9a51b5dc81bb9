"""Small language models over routes: XLNet, and GPT-2 or BERT in its place (paper, section 2.2 and Table 2).

The vocabulary is the model's routes: one token for each expert of each layer, one for "no expert", the two marks that
eMoE-L puts before a layer, and one token for each task, the first of which is "unknown". An output is read with the
same table: the scores of a layer's experts are products with the embeddings of their tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emoe.prediction.protocol import Array, RoutingShape

HIDDEN, LAYERS, HEADS, INNER = 64, 2, 4, 256
"""160,000 parameters for gpt-oss-20b (24 x 32); the paper's XLNet has 108 million. A history of a few hundred prompts
does not feed more."""
DROPOUT = 0.1
INITIAL_DEVIATION = 0.1
"""Of the weights. Accuracy of eMoE-A and -L on a half of gpt-oss-20b: 0.532 and 0.501 with the usual 0.02, 0.534 and
0.508 with this, 0.392 and 0.495 with 0.2."""


class Vocabulary:
    """Token numbers: expert e of layer l is l * experts + e, the rest follow."""

    def __init__(self, shape: RoutingShape, tasks: int) -> None:
        self.shape = shape
        self.nothing = shape.layers * shape.experts
        self.first, self.onward = self.nothing + 1, self.nothing + 2
        self.unknown_task = self.nothing + 3
        self.size = self.unknown_task + 1 + tasks

    def task(self, index: int | None) -> int:
        """The token of task number `index`; None is unknown."""
        return self.unknown_task if index is None else self.unknown_task + 1 + index

    def most_used(self, amounts: Array) -> Array:
        """int64 [..., layers, k]: each layer's k most used experts as tokens, most first, of amounts [..., layers,
        experts]. Ties go to the lower number; unused experts are "no expert"."""
        return self.most_used_in(np.arange(self.shape.layers), amounts)

    def most_used_in(self, layers: Array, amounts: Array) -> Array:
        """The same for amounts [..., experts] of these layers int [...]."""
        best = np.argsort(-amounts, axis=-1, kind="stable")[..., : self.shape.top_k]
        tokens = layers[..., None] * self.shape.experts + best
        return np.where(np.take_along_axis(amounts, best, axis=-1) > 0, tokens, self.nothing)


class RouteNetwork(nn.Module):
    """A trunk over route tokens, and scores of each layer's experts.

    kind: "xlnet", "gpt2" or "bert". length: tokens in the longest sequence.
    """

    def __init__(self, kind: str, vocabulary: Vocabulary, length: int) -> None:
        super().__init__()
        self.shape = vocabulary.shape
        self.trunk = _trunk(kind, vocabulary.size, length)
        self.popularity = nn.Parameter(torch.zeros(self.shape.layers, self.shape.experts))

    def hidden(self, ids: Tensor) -> Tensor:
        """[batch, length, hidden] of tokens int64 [batch, length]."""
        states: Tensor = self.trunk(input_ids=ids).last_hidden_state
        return states

    def all_layers(self, ids: Tensor) -> Tensor:
        """eMoE-A: logits [batch, layers, experts] of int64 [batch, 1 + layers * k]: a task, then each layer's k."""
        states = self.hidden(ids)[:, 1:].reshape(len(ids), self.shape.layers, self.shape.top_k, -1).mean(2)
        return torch.einsum("blh,leh->ble", states, self._table()) + self.popularity

    def one_layer(self, ids: Tensor, layers: Tensor) -> Tensor:
        """eMoE-L: logits [batch, experts] of layers [batch], from int64 [batch, 2 + k]: a task, a mark, k experts."""
        state = self.hidden(ids)[:, 2:].mean(1)
        return torch.einsum("bh,beh->be", state, self._table()[layers]) + self.popularity[layers]

    def _table(self) -> Tensor:
        table: Tensor = self.trunk.get_input_embeddings().weight
        return table[: self.shape.layers * self.shape.experts].reshape(self.shape.layers, self.shape.experts, -1)


def _trunk(kind: str, vocabulary: int, length: int) -> Any:
    # Importing all three takes seconds, and a predictor's process needs one.
    quiet: dict[str, Any] = {
        "vocab_size": vocabulary,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "initializer_range": INITIAL_DEVIATION,
    }
    if kind == "xlnet":
        from transformers import XLNetConfig, XLNetModel

        config = XLNetConfig(
            **quiet, d_model=HIDDEN, n_layer=LAYERS, n_head=HEADS, d_inner=INNER, dropout=DROPOUT, use_mems_eval=False
        )
        return XLNetModel(config)
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2Model

        drops = {"resid_pdrop": DROPOUT, "embd_pdrop": DROPOUT, "attn_pdrop": DROPOUT}
        return GPT2Model(
            GPT2Config(**quiet, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=INNER, n_positions=length, **drops)
        )
    from transformers import BertConfig, BertModel

    config = BertConfig(
        **quiet,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=length,
        hidden_dropout_prob=DROPOUT,
        attention_probs_dropout_prob=DROPOUT,
    )
    return BertModel(config, add_pooling_layer=False)
