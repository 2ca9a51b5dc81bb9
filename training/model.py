"""A lean training copy of Qwen3-MoE: the mathematics and tensor names of transformers' class, fast on a CPU.

Matrix products run in bf16 (4x f32 on a core with avx512_bf16), the residual stream and norms in f32.
`export.py` checks that transformers computes the same logits from the exported checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor


@dataclass(frozen=True)
class Shape:
    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    head_dim: int = 32
    experts: int = 16
    expert_hidden: int = 160
    top_k: int = 2
    rope_theta: float = 10000.0
    eps: float = 1e-6

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class SortedExperts(torch.autograd.Function):
    """Experts over tokens sorted by expert, one product per expert written into its rows of one buffer.

    A token has exactly k rows, so both directions gather with the inverse permutation and never scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        tokens, k = ids.shape
        experts, two_i, hidden = gate_up.shape
        order = ids.reshape(-1).argsort(stable=True)
        token = order // k
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        ends = torch.bincount(ids.reshape(-1), minlength=experts).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        gate_up16, down16 = gate_up.to(x.dtype), down.to(x.dtype)
        xs = x.index_select(0, token)
        gu = x.new_empty(tokens * k, two_i)
        for e, (s, t) in enumerate(zip(starts, ends, strict=True)):
            torch.mm(xs[s:t], gate_up16[e].t(), out=gu[s:t])
        gate, up = gu.chunk(2, dim=-1)
        h = F.silu(gate) * up
        y = x.new_empty(tokens * k, hidden)
        for e, (s, t) in enumerate(zip(starts, ends, strict=True)):
            torch.mm(h[s:t], down16[e].t(), out=y[s:t])
        out = torch.bmm(weights.to(x.dtype).unsqueeze(1), y.index_select(0, inverse).view(tokens, k, hidden))
        ctx.save_for_backward(xs, gu, h, y, weights, order, token, inverse, gate_up16, down16)
        ctx.bounds = (starts, ends)
        return out.squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        xs, gu, h, y, weights, order, token, inverse, gate_up16, down16 = ctx.saved_tensors
        starts, ends = ctx.bounds
        tokens, k = weights.shape
        gs = grad.index_select(0, token)
        # Row-wise dot product by bmm: no [rows, hidden] intermediate is written.
        gw = torch.bmm(gs.unsqueeze(1), y.unsqueeze(2)).view(-1).float().index_select(0, inverse).view(tokens, k)
        gy = gs * weights.reshape(-1).index_select(0, order).to(gs.dtype).unsqueeze(1)
        gh = torch.empty_like(h)
        g_down = torch.empty_like(down16)
        for e, (s, t) in enumerate(zip(starts, ends, strict=True)):
            torch.mm(gy[s:t], down16[e], out=gh[s:t])
            torch.mm(gy[s:t].t(), h[s:t], out=g_down[e])
        gate, up = gu.chunk(2, dim=-1)
        ggu = torch.empty_like(gu)
        i = gate.shape[1]
        ggu[:, i:] = gh * F.silu(gate)
        ggu[:, :i] = torch.ops.aten.silu_backward(gh * up, gate)
        gxs = torch.empty_like(xs)
        g_gate_up = torch.empty_like(gate_up16)
        for e, (s, t) in enumerate(zip(starts, ends, strict=True)):
            torch.mm(ggu[s:t], gate_up16[e], out=gxs[s:t])
            torch.mm(ggu[s:t].t(), xs[s:t], out=g_gate_up[e])
        gx = gxs.index_select(0, inverse).view(tokens, k, -1).sum(1)
        return gx, gw, None, g_gate_up.float(), g_down.float()


sorted_experts: Callable[..., Any] = SortedExperts.apply


class Experts(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(shape.experts, 2 * shape.expert_hidden, shape.hidden))
        self.down_proj = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.expert_hidden))


class Router(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.experts, shape.hidden))


class SparseMlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.gate = Router(shape)
        self.experts = Experts(shape)

    def forward(self, x: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, hidden] in bf16, router probabilities -> output, chosen experts."""
        top, ids = probs.topk(self.top_k, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        out = sorted_experts(x, top, ids, self.experts.gate_up_proj, self.experts.down_proj)
        return out, ids


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.heads * shape.head_dim
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden, width, bias=False)
        self.v_proj = nn.Linear(shape.hidden, width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.eps)
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.eps)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [tokens, hidden] -> queries, keys, values as one bf16 [tokens, 3, heads, head_dim]."""
        s = self.shape
        w = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]).bfloat16()
        q, k, v = F.linear(x.bfloat16(), w).view(-1, 3, s.heads, s.head_dim).unbind(1)
        q = rotate(self.q_norm(q.float()), cos, sin).bfloat16()
        k = rotate(self.k_norm(k.float()), cos, sin).bfloat16()
        return torch.stack([q, k, v], dim=1)


def attend_documents(qkv: Tensor, buckets: Buckets) -> Tensor:
    """Causal attention inside each document. Documents of like length share one padded call; padding stands
    at the end of each, so causality alone hides it. -> [tokens, heads * head_dim]"""
    source = torch.cat([b.reshape(-1) for b in buckets.gather])
    padded = qkv.index_select(0, source)
    parts, start = [], 0
    for index in buckets.gather:
        count, length = index.shape
        block = padded[start : start + count * length].view(count, length, *qkv.shape[1:])
        start += count * length
        q, k, v = block.permute(2, 0, 3, 1, 4)
        y = causal_attention(q, k, v)
        parts.append(y.transpose(1, 2).reshape(count * length, -1))
    return torch.cat(parts).index_select(0, buckets.scatter)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Written out: at these lengths bmm + softmax in bf16 takes half the time of the CPU's flash kernels."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    length = q.shape[2]
    above = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)) + above
    return torch.matmul(scores.softmax(-1), v)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = SparseMlp(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.eps)

    def compile_parts(self) -> None:
        """Fuse the element-wise work around attention; the experts' data-dependent sizes stay outside."""
        inductor.cpp.dynamic_threads = True  # or the thread count of now is compiled in
        vars(self)["before"] = torch.compile(self.before)
        vars(self)["after"] = torch.compile(self.after)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after(self, x: Tensor, y: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
        y = F.linear(y, self.self_attn.o_proj.weight.bfloat16())
        x = x + F.dropout(y, dropout, self.training).float()
        normed = self.post_attention_layernorm(x)
        return x, normed.bfloat16(), F.linear(normed, self.mlp.gate.weight).softmax(-1)


class NanoMoe(nn.Module):
    """Parameter names are Qwen3MoeForCausalLM's without the `model.` prefix; the vocabulary is tied."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = 0.0
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                continue
            residual = name.endswith(("o_proj.weight", "down_proj"))
            fan_in = p.shape[-1]
            small = "embed" in name or "gate.weight" in name
            nn.init.normal_(p, std=0.02 if small else fan_in**-0.5 * (0.5 if residual else 1.0))

    def forward(self, ids: Tensor, buckets: Buckets) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Packed ids [tokens] -> normed hidden states, and per layer the router's view and choice."""
        s = self.shape
        inv = s.rope_theta ** (-torch.arange(0, s.head_dim, 2, device=ids.device).float() / s.head_dim)
        angle = buckets.positions[:, None].float() * inv
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        x = self.embed_tokens(ids)
        probs, chosen = [], []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            y = attend_documents(layer.before(x, cos, sin), buckets)
            x, normed, p = layer.after(x, y, self.dropout)
            y, c = layer.mlp(normed, p)
            x = x + F.dropout(y, self.dropout, self.training)
            probs.append(p)
            chosen.append(c)
        return self.norm(x), probs, chosen

    def loss_sum(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sum of cross-entropies, and (without gradient) the loss of each token."""
        vocab = self.embed_tokens.weight
        result: tuple[Tensor, Tensor] = chunked_loss(hidden.bfloat16(), vocab, targets, weights, self.training)
        return result


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy against the tied vocabulary, a chunk of tokens at a time, gradients made on the way: one
    chunk's logits exist at a time (0.3 s instead of 0.75 s for 8,192 tokens on two cores)."""

    CHUNK = 2048

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, vocab: Tensor, targets: Tensor, weights: Tensor, train: bool
    ) -> tuple[Tensor, Tensor]:
        v16 = vocab.bfloat16()
        losses = torch.empty(len(x), device=x.device)
        gx, gv = torch.empty_like(x), torch.zeros_like(vocab)
        for s in range(0, len(x), ChunkedLoss.CHUNK):
            part = slice(s, s + ChunkedLoss.CHUNK)
            probs = torch.mm(x[part], v16.t()).float()
            rows = torch.arange(len(probs), device=x.device)
            probs.sub_(probs.max(-1, keepdim=True).values)
            picked = probs[rows, targets[part]]
            probs.exp_()
            total = probs.sum(-1, keepdim=True)
            losses[part] = total.squeeze(1).log() - picked
            if train:
                probs.mul_(weights[part, None] / total)
                probs[rows, targets[part]] -= weights[part]
                g = probs.bfloat16()
                torch.mm(g, v16, out=gx[part])
                gv += torch.mm(g.t(), x[part])
        ctx.save_for_backward(gx, gv)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        gx, gv = ctx.saved_tensors
        return gx * grad.to(gx.dtype), gv * grad, None, None, None


chunked_loss: Callable[..., Any] = ChunkedLoss.apply


@dataclass(frozen=True)
class Buckets:
    """Where each packed document lies: indices that gather like-length documents, and the way back."""

    positions: Tensor
    gather: tuple[Tensor, ...]
    scatter: Tensor

    @staticmethod
    def of(lengths: list[int], device: torch.device, steps: tuple[int, ...] = (64, 96, 128, 192, 256, 384)) -> Buckets:
        groups: dict[int, list[tuple[int, int]]] = {}
        start = 0
        for n in lengths:
            cap = next((c for c in steps if n <= c), n)
            groups.setdefault(cap, []).append((start, n))
            start += n
        scatter, gather, offset = np.empty(start, np.int64), [], 0
        positions = np.empty(start, np.int64)
        for cap, docs in sorted(groups.items()):
            first = np.array([s for s, _ in docs])[:, None]
            size = np.array([n for _, n in docs])[:, None]
            step = np.arange(cap)[None]
            real = step < size
            index = first + np.minimum(step, size - 1)
            scatter[index[real]] = (offset + np.arange(index.size).reshape(index.shape))[real]
            positions[index[real]] = np.broadcast_to(step, index.shape)[real]
            gather.append(torch.from_numpy(index).to(device))
            offset += index.size
        return Buckets(torch.from_numpy(positions).to(device), tuple(gather), torch.from_numpy(scatter).to(device))
