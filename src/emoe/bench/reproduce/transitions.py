"""How well a token's experts in one layer tell its experts in the next: what Figure 3 shows, as numbers."""

from __future__ import annotations

import dataclasses

import numpy as np

from emoe.prediction.protocol import Array, RoutingShape
from emoe.prediction.transitions import Transitions
from emoe.routing.trace import Trace


def pairs_of(trace: Trace) -> Array:
    """int [layers - 1, experts, experts]: tokens that went to expert a in a layer and to b in the next."""
    counter = Transitions(RoutingShape.of(trace))
    counter.fit(trace)
    return counter.state()["pairs"]


def onward(pairs: Array) -> Array:
    """float64, as `pairs`: of the pairs that begin with a, the share that ends in b; uniform without evidence."""
    evidence = pairs.sum(axis=2, keepdims=True)
    found: Array = np.divide(pairs, evidence, out=np.full(pairs.shape, 1 / pairs.shape[2]), where=evidence > 0)
    return found


def shuffled(trace: Trace, seed: int, within: bool = False) -> Trace:
    """The same choices in each layer, dealt to other tokens (`within`: of the same prompt), layer by layer.

    Nothing is left that links a token's experts from one layer to the next; within prompts, what links the prompt's.
    """
    rng, prompt = np.random.default_rng(seed), trace.prompt_of_token()
    experts = trace.experts.copy()
    for layer in range(experts.shape[1]):
        # Sorted by prompt, a layer's rows meet themselves again in another order.
        order = np.lexsort((rng.random(len(trace)), prompt)) if within else rng.permutation(len(trace))
        experts[:, layer] = trace.experts[order, layer]
    return dataclasses.replace(trace, experts=experts, weights=None)


def information(pairs: Array) -> tuple[Array, Array]:
    """float64 [layers - 1] each, in bits: the mutual information of a pair's experts, and the entropy of its second."""
    joint = pairs / np.maximum(1, pairs.sum(axis=(1, 2), keepdims=True))
    first, second = joint.sum(axis=2), joint.sum(axis=1)
    entropy = _entropy(second)
    return _entropy(first) + entropy - _entropy(joint.reshape(len(joint), -1)), entropy


def _entropy(shares: Array) -> Array:
    logs = np.log2(shares, out=np.zeros(shares.shape), where=shares > 0)
    found: Array = -(shares * logs).sum(axis=1)
    return found


def named(pairs: Array, routes: Array) -> Array:
    """float64 [layers - 1]: of the experts that tokens [tokens, layers, k] chose in a layer, the share that the
    transitions from their experts in the layer before name, by the k most likely next.

    Tokens with a choice that was not computed are left out of its two layers.
    """
    steps, experts = onward(pairs), pairs.shape[1]
    found = np.zeros(len(steps))
    for layer, step in enumerate(steps):
        known = (routes[:, layer : layer + 2] < experts).all(axis=(1, 2))
        now, after = routes[known, layer], routes[known, layer + 1]
        found[layer] = _named(step[now].sum(axis=1), after)
    return found


def popular(counts: Array, routes: Array) -> Array:
    """As `named`, by the k experts that counts [layers, experts] say are used most."""
    experts, found = counts.shape[1], np.zeros(len(counts) - 1)
    for layer in range(1, len(counts)):
        known = (routes[:, layer - 1 : layer + 1] < experts).all(axis=(1, 2))
        after = routes[known, layer]
        found[layer - 1] = _named(np.broadcast_to(counts[layer], (len(after), experts)), after)
    return found


def _named(scores: Array, after: Array) -> float:
    best = np.argsort(-scores, axis=1, kind="stable")[:, : after.shape[1]]
    hits = (best[:, :, None] == after[:, None, :]).any(axis=1)
    return float(hits.mean()) if hits.size else float("nan")


def some(trace: Trace, most: int, seed: int) -> Array:
    """At most that many tokens' routes [tokens, layers, k], drawn at random."""
    rows = np.random.default_rng(seed).permutation(len(trace))[:most]
    found: Array = trace.experts[np.sort(rows)]
    return found


def one_hot(routes: Array, experts: int) -> Array:
    """float64 [tokens, experts]: 1 where a token [tokens, k] was routed to the expert."""
    found = np.zeros((len(routes), experts + 1))
    np.put_along_axis(found, np.minimum(routes, experts).astype(np.int64), 1.0, axis=1)
    return found[:, :experts]
