"""Muon for the matrices, AdamW for the rest.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix, found with five
Newton-Schulz steps. Every expert's projection is a matrix of its own; like shapes of all layers are one
batched bf16 product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """[..., rows, columns] -> nearest semi-orthogonal, roughly (singular values 0.7 to 1.2)."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = -4.7750 * a + 2.0315 * (a @ a)
        x = 3.4445 * x + b @ x
    result: Tensor = x.mT if tall else x
    return result


def matrices(name: str, p: Tensor) -> Tensor:
    """A parameter as the matrices that Muon treats one by one, gate and up apart: [n, rows, columns]."""
    if name.endswith("gate_up_proj"):
        return p.view(2 * p.shape[0], p.shape[1] // 2, p.shape[2])
    return p if p.dim() == 3 else p.unsqueeze(0)


class Muon:
    def __init__(self, params: list[tuple[str, nn.Parameter]], lr: float, decay: float, momentum: float = 0.95):
        self.params, self.lr, self.decay, self.momentum = params, lr, decay, momentum
        self.buffers = {name: torch.zeros_like(p) for name, p in params}

    @torch.no_grad()
    def step(self, scale: float) -> None:
        groups: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for name, p in self.params:
            assert p.grad is not None, name
            buffer = self.buffers[name]
            buffer.lerp_(p.grad, 1 - self.momentum)
            nesterov = p.grad.lerp(buffer, self.momentum)
            view = matrices(name, p)
            groups.setdefault(view.shape[1:], []).append((view, matrices(name, nesterov)))
        lr = self.lr * scale
        for shape, members in groups.items():
            updates = orthogonalise(torch.cat([u for _, u in members])).float()
            size = max(1.0, shape[0] / shape[1]) ** 0.5
            for (view, _), u in zip(members, torch.split(updates, [len(v) for v, _ in members]), strict=True):
                view.mul_(1 - lr * self.decay).add_(u, alpha=-lr * size)


class Optimiser:
    def __init__(self, model: nn.Module, muon_lr: float, adam_lr: float, decay: float) -> None:
        matrix, embedding, rest = [], [], []
        for name, p in model.named_parameters():
            if "embed_tokens" in name:
                embedding.append(p)
            elif p.dim() >= 2 and not name.endswith("mlp.gate.weight"):
                matrix.append((name, p))
            else:
                rest.append(p)
        self.muon = Muon(matrix, muon_lr, decay)
        groups = [{"params": embedding, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10)
        self.adam_lr = adam_lr
        self.params = list(model.parameters())

    def step(self, scale: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        self.muon.step(scale)
        for p in self.params:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.buffers, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, buffer in self.muon.buffers.items():
            buffer.copy_(state["muon"][name])
        self.adam.load_state_dict(state["adam"])
