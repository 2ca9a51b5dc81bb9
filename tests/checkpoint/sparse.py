"""Checkpoints of real size that occupy no disk: true headers over files that are one hole."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig


def write_sparse_qwen3_moe(directory: Path, layers: int, experts: int, hidden: int, width: int, shards: int) -> int:
    """A Qwen3-MoE checkpoint of the given sizes in bfloat16, in the hub's layout; returns its bytes."""
    config = Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=8,
        dtype=torch.bfloat16,
        architectures=["Qwen3MoeForCausalLM"],
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            shapes |= {
                f"{module}.{expert}.{part}_proj.weight": (width, hidden)
                for expert in range(experts)
                for part in ("gate", "up")
            }
        elif leaf == "down_proj":
            shapes |= {f"{module}.{expert}.down_proj.weight": (hidden, width) for expert in range(experts)}
        else:
            shapes[name] = tuple(tensor.shape)
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, at = {}, 0
        for name in names[shard * len(names) // shards : (shard + 1) * len(names) // shards]:
            nbytes = 2 * prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + nbytes]}
            weight_map[name] = file
            at += nbytes
        raw = json.dumps(header).encode()
        with (directory / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(raw)) + raw)
            stream.truncate(8 + len(raw) + at)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(2 * prod(shape) for shape in shapes.values())
