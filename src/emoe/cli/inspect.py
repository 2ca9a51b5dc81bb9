"""`emoe inspect`: where every expert lies, how it would be read, and what a budget would keep resident."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe.checkpoint.codecs.formats import NATIVE, codec_of
from emoe.cli.early import refuse_early
from emoe.cli.options import READERS, add_command, add_expert_dtype, add_json, add_model, expert_memory
from emoe.cli.output import lossy_experts, print_json, table
from emoe.config import ExpertMemory, format_bytes
from emoe.errors import UsageError

if TYPE_CHECKING:
    from emoe.checkpoint.codecs.formats import ExpertCodec
    from emoe.checkpoint.index import ExpertIndex, LayerIndex
    from emoe.residency.budget import SlotPlan


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "inspect", run, "Show where a checkpoint's experts lie and how they would be read.")
    add_model(parser)
    parser.add_argument("--layer", type=int, metavar="L", help="the byte ranges of this layer's experts")
    parser.add_argument("--expert", type=int, metavar="E", help="of this expert only (with --layer)")
    parser.add_argument(
        "--expert-memory",
        type=expert_memory,
        default=ExpertMemory("share", 0.4),
        metavar="SIZE",
        help="the budget to show residency and reader for (default: 40%%)",
    )
    add_expert_dtype(parser)
    parser.add_argument("--reader", choices=READERS, default="auto", help="ask for a way of reading")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the index, or the pieces of some experts."""
    if args.expert is not None and args.layer is None:
        raise UsageError("--expert needs --layer: an expert is (layer, expert)")
    refuse_early(args.model, args.expert_memory, args.expert_dtype)
    from emoe import nano
    from emoe.checkpoint.index import build_index, skeleton
    from emoe.checkpoint.memory_room import choose_reader
    from emoe.checkpoint.source import resolve
    from emoe.model.bind import layer_needs
    from emoe.residency.budget import plan_slots

    path = nano.path() if args.model is None else resolve(args.model, revision=args.revision)
    config, model = skeleton(path, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    index = build_index(path, model)
    codec = codec_of(args.expert_dtype)
    if codec is not None:
        index = _made(index, codec, args)
    if args.layer is not None:
        pieces = _pieces(index, args.layer, args.expert)
        if args.json:
            print_json({"model": str(args.model or "emoe-nano"), "path": index.path, "pieces": pieces})
        else:
            print(_pieces_text(pieces))
        return 0
    slots = plan_slots(args.expert_memory, layer_needs(index, model))
    reader = choose_reader(index, slots.resident_bytes, args.reader)
    facts = _facts(index, str(args.model or "emoe-nano"), config.model_type, slots, args.expert_memory, reader)
    if args.json:
        print_json(facts)
    else:
        print(_text(facts))
    return 0


def _made(index: ExpertIndex, codec: ExpertCodec, args: argparse.Namespace) -> ExpertIndex:
    """The experts as the codec stores them, where that has been done: inspecting writes nothing."""
    from emoe.checkpoint.codecs.cache import cache_name, find_cache, places
    from emoe.checkpoint.codecs.store import open_cache
    from emoe.checkpoint.fingerprint import fingerprint

    cache = None if args.expert_cache is None else Path(args.expert_cache).expanduser()
    name = cache_name(codec.name, fingerprint(index.path))
    found = find_cache(places(index.path, cache, beside=True), name)
    if found is None:
        raise UsageError(
            f"{index.path} has no {codec.name} experts yet: make them with `emoe quantise {args.model or ''} "
            f"--expert-dtype {codec.name}`, or ask `emoe plan` for their sizes"
        )
    return open_cache(found, index, codec)


def _layer(index: ExpertIndex, number: int) -> LayerIndex:
    try:
        return index.layer(number)
    except KeyError:
        known = ", ".join(str(layer.layer) for layer in index.layers)
        raise UsageError(f"layer {number} has no experts; these layers have: {known}") from None


def _pieces(index: ExpertIndex, layer: int, expert: int | None) -> list[dict[str, Any]]:
    """The pieces of a layer's experts, as plain values."""
    entry = _layer(index, layer)
    if expert is not None and not 0 <= expert < entry.num_experts:
        raise UsageError(f"layer {layer} has experts 0 to {entry.num_experts - 1}, not {expert}")
    experts = range(entry.num_experts) if expert is None else (expert,)
    return [
        {
            "layer": layer,
            "expert": number,
            "part": piece.part,
            "region": [[s.start or 0, s.stop] for s in piece.dst_index],
            "tensor": piece.entry_name,
            "file": piece.file.name,
            "offset": piece.offset,
            "nbytes": piece.nbytes,
            "dtype": piece.dtype,
            "direct": piece.direct,
        }
        for number in experts
        for piece in index.pieces(layer, number)
    ]


def _pieces_text(pieces: list[dict[str, Any]]) -> str:
    rows = [("expert", "part", "file", "first byte", "bytes", "tensor", "")]
    for piece in pieces:
        key = f"{piece['layer']}.{piece['expert']}"
        how = "" if piece["direct"] else "rearranged"
        rows.append(
            (
                key,
                piece["part"],
                piece["file"],
                f"{piece['offset']:,}",
                f"{piece['nbytes']:,}",
                piece["tensor"],
                how,
            )
        )
    return table(rows, right=(3, 4), indent="")


def _facts(
    index: ExpertIndex,
    name: str,
    model_type: str,
    slots: SlotPlan,
    memory: ExpertMemory,
    reader: tuple[str, str],
) -> dict[str, Any]:
    """Everything `inspect` prints, as plain values."""
    quotas = {layer: quota for pool in slots.pools for layer, quota in pool.quotas.items()}
    layers = []
    for layer in index.layers:
        first = index.pieces(layer.layer, 0)
        layers.append(
            {
                "layer": layer.layer,
                "module": layer.module,
                "experts": layer.num_experts,
                "expert_nbytes": layer.expert_nbytes,
                "stored_nbytes": index.stored_nbytes(layer.layer, 0),
                "parts": [{"name": p.name, "shape": list(p.shape), "dtype": p.dtype} for p in layer.parts],
                "tensors_per_expert": len({piece.entry_name for piece in first}),
                "direct": all(piece.direct for piece in first),
                "layout": _layout(index, layer),
                "resident": quotas[layer.layer],
            }
        )
    return {
        "model": name,
        "path": index.path,
        "model_type": model_type,
        "files": {path.name: stamp.nbytes for path, stamp in index.files.items()},
        "dense_bytes": index.dense_nbytes,
        "expert_dtype": index.expert_dtype,
        "expert_bytes": index.total_expert_nbytes,
        "experts": sum(layer.num_experts for layer in index.layers),
        "expert_memory": str(memory),
        "budget_bytes": slots.budget_bytes,
        "resident_bytes": slots.resident_bytes,
        "floor_bytes": slots.floor_bytes,
        "slots": slots.slots,
        "reader": reader[0],
        "reader_reason": reader[1],
        "layers": layers,
    }


def _layout(index: ExpertIndex, layer: LayerIndex) -> str:
    """How the layer's experts are stored, in words."""
    first, last = (
        {piece.entry_name for piece in index.pieces(layer.layer, expert)} for expert in (0, layer.num_experts - 1)
    )
    return "one tensor for all experts" if first & last else "tensors of its own for each expert"


def _text(facts: dict[str, Any]) -> str:
    size = format_bytes
    layers: list[dict[str, Any]] = facts["layers"]
    alike = Counter(
        (
            layer["experts"],
            layer["expert_nbytes"],
            layer["layout"],
            layer["direct"],
            tuple(f"{p['name']} {p['shape']} {p['dtype']}" for p in layer["parts"]),
        )
        for layer in layers
    )
    stored = sum(facts["files"].values())
    lines = [
        f"{facts['model']} ({facts['model_type']}) in {facts['path']}",
        f"  {len(facts['files'])} file(s), {size(stored)}: {size(facts['dense_bytes'])} dense and "
        f"{size(facts['expert_bytes'])} in {facts['experts']} experts when loaded",
    ]
    if facts["expert_dtype"] != NATIVE:
        lines.append(f"  LOSSY: {lossy_experts(facts['expert_dtype'])}")
    for (experts, nbytes, layout, direct, parts), count in alike.items():
        how = "read straight into place" if direct else "rearranged while it is read"
        lines.append(f"  {count} layers x {experts} experts of {size(nbytes)}: {layout}, {how}")
        lines.extend(f"    {part}" for part in parts)
    share = facts["slots"] / facts["experts"]
    lines += [
        f"  with --expert-memory {facts['expert_memory']}: {facts['slots']} experts resident ({share:.0%}, "
        f"{size(facts['resident_bytes'])}), {_per_layer(layers)}; at least {size(facts['floor_bytes'])}",
        f"  reader {facts['reader']}: {facts['reader_reason']}",
        "  --layer L [--expert E] lists byte ranges",
    ]
    return "\n".join(lines)


def _per_layer(layers: list[dict[str, Any]]) -> str:
    counts = [layer["resident"] for layer in layers]
    if not any(counts):
        return "one pool shared by all layers"
    low, high = min(counts), max(counts)
    return f"{low} per layer" if low == high else f"{low} to {high} per layer"
