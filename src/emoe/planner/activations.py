"""What a pass makes and drops again. Arithmetic, for torch's kernels and for those in C.

torch computes norms in float32, gathers the rows of an expert, and holds what lies between its products. Where the C
kernels read prompts (`kernels.processor`) there is none of that, nor any scores or wide mask: what is left are a
layer's own tensors, what the experts give before it is added up, and a few MiB of each thread.
"""

from __future__ import annotations

from emoe.checkpoint.codecs.formats import NATIVE
from emoe.kernels.processor import usable_threads, why_torch
from emoe.planner.facts import Facts, dtype_bytes

COMBINE_TOKENS = 128
"""Tokens whose expert outputs are added at once (emoe.kernels.combining.COMBINE_TOKENS)."""

WORKSPACE_KEPT_BYTES = 32 << 20
"""The largest workspace that stays between two layers (emoe.kernels.combining.WORKSPACE_KEPT_BYTES)."""

WAVE_ROWS = 16384
"""Rows of one launch on a GPU, whose intermediate lies in memory at once (emoe.kernels.slots.WAVE_ROWS)."""

UNPACKED = 1 << 17
"""Numbers of a quantised matrix unpacked at once (emoe.kernels.quantised.UNPACKED), of 12 bytes on their way."""

MASK_NBYTES = 3
"""Of a mask for each pair of tokens: as booleans, and in a 16-bit dtype."""

MANY_KEYS = 8192
"""Keys up to which the C kernels attend (emoe.kernels.attention.MANY_KEYS)."""

MANY_ROWS = 128
"""Rows of an expert that they compute at once (native/many.h)."""

TALL, PANEL, DEEP = 12, 256, 384
"""Of native/many.h: queries at once, and the columns and rows of a packed block."""

KEYS_TOGETHER = 32
"""Keys are padded to multiples of it (native/many_attention.h)."""

MOST_THREADS = 64
"""Of the C kernels (native/pool.h)."""

HOLES_BYTES = 16 << 20
"""Freed memory between what is in use, at most, and at most a quarter of it: measured on three models (docs/log.md)."""

BLOCKS_BYTES = 32 << 20
"""What attention over more keys holds of one block of rows (emoe.kernels.sinks), or of a head that torch packs."""


def why_not_native(facts: Facts) -> str:
    """Why prompts are counted as torch reads them on this machine's CPU; nothing where the C kernels do."""
    if not facts.activations.native_token_nbytes:
        return "the model has layers whose kernels its tensors do not tell"
    return why_torch(facts.dtype)


def activation_bytes(
    facts: Facts, prompt: int, batch: int, before: int = 0, *, native: bool = False, on_device: bool = False
) -> int:
    """Upper bound of what one pass over `batch` prompts of `prompt` tokens, `before` read already, holds at its fullest
    moment.

    That is inside a decoder layer's attention or dense MLP, or inside its experts, or at the logits of the last token
    of each sequence (in the run dtype, in float32 and once more for sampling). Beside it, sliding layers keep the whole
    prompt's keys and values until the next step cuts them, padded sequences have a mask, and the experts' workspace
    stays while it is small. `native`: as the C kernels compute it (`why_not_native`), else as torch does.
    """
    if native and not on_device:
        return _native_bytes(facts, prompt, batch, before)
    a, tokens, itemsize = facts.activations, prompt * batch, dtype_bytes(facts.dtype)
    pairs = batch * prompt * (before + prompt)
    # Keys and values that are kept narrow are widened for all tokens in every pass.
    latent = any(layer.kind == "latent" for layer in facts.cache_layers)
    widened = tokens + batch * before if latent else tokens
    block = widened * a.token_nbytes + a.written(pairs)
    workspace = workspace_bytes(facts, tokens)
    route = _route_bytes(facts, tokens, _rows_at_once(facts, tokens) if on_device else tokens)
    experts = 2 * tokens * a.hidden * itemsize + route + workspace + _unpacked_bytes(facts)
    logits = batch * a.vocabulary * (itemsize + 2 * 4)
    kept = workspace if workspace <= WORKSPACE_KEPT_BYTES else 0
    beyond_window = sum(layer.nbytes(prompt, whole=True) - layer.nbytes(prompt) for layer in facts.cache_layers)
    # A later pass over a prompt has a mask even for one sequence.
    mask = MASK_NBYTES * pairs if a.masked or batch > 1 or before else 0
    return max(block + kept, experts, logits + kept) + batch * beyond_window + mask


def _native_bytes(facts: Facts, prompt: int, batch: int, before: int) -> int:
    """`activation_bytes` of the C kernels on a CPU.

    The fullest moment of attention is where positions are turned into queries, or where the cache of a layer grows: old
    and new keys are there together. In its experts a layer holds four times its tokens (the embeddings, what came in,
    that with attention's output, and its norm), what each token's experts give, and the sum of it.
    """
    a, itemsize, keys = facts.activations, dtype_bytes(facts.dtype), before + prompt
    tokens, row = prompt * batch, a.hidden * itemsize
    grown = batch * max((layer.nbytes(before + prompt) for layer in facts.cache_layers), default=0)
    block = tokens * a.native_token_nbytes
    growing = tokens * a.native_cached_nbytes + (grown if before else 0)
    by_c = keys <= MANY_KEYS
    written = 0 if by_c else a.written(batch * prompt * keys) + BLOCKS_BYTES
    if facts.expert_dtype == NATIVE and a.gate_known:
        workspace = (tokens * facts.top_k + MANY_ROWS) * row
        experts = 5 * tokens * row + _routing_bytes(facts, tokens) + workspace
    else:
        workspace = workspace_bytes(facts, tokens)
        experts = 2 * tokens * row + _route_bytes(facts, tokens, tokens) + workspace + _unpacked_bytes(facts)
    kept = workspace if workspace <= WORKSPACE_KEPT_BYTES else 0
    logits = batch * a.vocabulary * (itemsize + 2 * 4)
    masks, making = _masks_bytes(facts, prompt, batch, before, by_c)
    beyond = batch * sum(
        max(0, min(before, layer.window) + prompt - layer.window) * layer.token_nbytes
        for layer in facts.cache_layers
        if layer.window is not None
    )
    fullest = max(max(block + written, growing, logits, grown) + kept, experts, making + kept + tokens * row)
    made = fullest + masks + beyond
    return made + min(made // 4, HOLES_BYTES) + scratch_bytes(facts, keys)


def _masks_bytes(facts: Facts, prompt: int, batch: int, before: int, by_c: bool) -> tuple[int, int]:
    """Of masks while a pass goes on, and beside them while they are made.

    One sequence that is read in one pass needs one in layers with a window; else full layers need one too. They are
    booleans, which torch's fused attention makes 16-bit numbers of (not attention with sinks, which goes by blocks).
    """
    a, pairs = facts.activations, batch * prompt * (before + prompt)
    window = min([layer.window for layer in facts.cache_layers if layer.window is not None], default=0)
    near = batch * prompt * (min(before, window) + prompt) if a.masked else 0
    if not (a.masked or batch > 1 or before):
        return 0, 0
    masks = near + (pairs if batch > 1 or before else 0)
    wide = 0 if by_c or a.block_nbytes else 2 * pairs
    return masks + wide, max(0, 2 * max(near, pairs if batch > 1 or before else 0) - wide)


def scratch_bytes(facts: Facts, keys: int) -> int:
    """What the C kernels' threads keep: each the packed keys and values of one key head and a few rows of scores, or a
    packed block of a matrix; the one that calls them some rows of an expert on the way in, between its products and
    before the second.
    """
    a, itemsize = facts.activations, dtype_bytes(facts.dtype)
    padded = -(-min(keys, MANY_KEYS) // KEYS_TOGETHER) * KEYS_TOGETHER
    attention = padded * (a.head_nbytes + TALL * (4 + 2)) + TALL * PANEL * 4
    block = PANEL * (DEEP * 2 + MANY_ROWS * 4)
    expert = MANY_ROWS * (a.hidden + a.expert_inner + a.expert_inner // 2) * itemsize
    threads = min(usable_threads(), MOST_THREADS)
    return threads * (attention + block) + max(0, expert - attention)


def workspace_bytes(facts: Facts, tokens: int) -> int:
    """What one layer's experts compute a chunk in (emoe.kernels.combining.Workspace), at worst.

    A row of hidden for each token and choice on the way in and on the way out, in blocks rounded up by a quarter at
    worst, and the rows of one block of tokens that are being added, once more in float32.
    """
    a, k, itemsize = facts.activations, facts.top_k, dtype_bytes(facts.dtype)
    rows = 5 * tokens * k * a.hidden * itemsize // 2
    return rows + min(tokens, COMBINE_TOKENS) * k * a.hidden * (itemsize + 4)


def _rows_at_once(facts: Facts, tokens: int) -> int:
    """Rows whose intermediate a GPU's kernels hold: of one launch, or of one expert where that has more."""
    return max(min(tokens * facts.top_k, WAVE_ROWS), tokens)


def _route_bytes(facts: Facts, tokens: int, rows: int) -> int:
    """What one layer's experts hold for a chunk beside their workspace (emoe.kernels.chunks.many_tokens).

    The route, and the intermediate of `rows` (of one expert, at worst all tokens), or the result and the sum of one
    block of it.
    """
    a, itemsize = facts.activations, dtype_bytes(facts.dtype)
    inner = 2 * rows * a.expert_inner * itemsize
    combine = min(tokens, COMBINE_TOKENS) * a.hidden * 4 + tokens * a.hidden * itemsize
    return _routing_bytes(facts, tokens) + max(inner, combine)


def _routing_bytes(facts: Facts, tokens: int) -> int:
    """The route: probabilities of all experts in float32, the chosen ones as 64-bit numbers, sorted and placed."""
    return tokens * (3 * 4 * max(layer.experts for layer in facts.expert_layers) + 10 * 8 * facts.top_k)


def _unpacked_bytes(facts: Facts) -> int:
    """What a chunk's kernel unpacks of quantised experts: their largest matrix in the run dtype, block by block."""
    if facts.expert_dtype == NATIVE:
        return 0
    return facts.activations.hidden * facts.activations.expert_inner * dtype_bytes(facts.dtype) + 12 * UNPACKED
