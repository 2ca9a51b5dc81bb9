"""Turn a training state into the shipped folder: a standard Qwen3-MoE checkpoint with one tensor per expert.

python -m training.export --data ../shared/data/tasks --state build/nano --to src/emoe/nano"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3MoeConfig

from training.batches import pack
from training.data import Example, load
from training.model import NanoMoe, Shape
from training.own_prompts import CLASSIFY, COMPARE
from training.templates import HELD_OUT, TASKS, TRAIN, render
from training.train import held_out_documents

MAX_BYTES = 32_000_000
PROMPTS_PER_TASK = 8


def tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fused training parameters -> hub names, bf16."""
    result: dict[str, Tensor] = {}
    for key, parameter in state.items():
        name, value = f"model.{key}", parameter.to("cpu", torch.bfloat16)
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(value):
                gate, up = both.chunk(2)
                prefix = name.replace("gate_up_proj", str(e))
                result[f"{prefix}.gate_proj.weight"] = gate.contiguous()
                result[f"{prefix}.up_proj.weight"] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(value):
                result[f"{name.replace('down_proj', str(e))}.down_proj.weight"] = down.contiguous()
        else:
            result[name] = value.contiguous()
    return result


def config(shape: Shape, pad: int, eos: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.expert_hidden * shape.top_k,
        moe_intermediate_size=shape.expert_hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        rms_norm_eps=shape.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=None,
        dtype="bfloat16",
    )


def prompts(examples: list[Example]) -> list[dict[str, str]]:
    """Held-out items where the licence allows it, own texts where not; the last two in held-out phrasings."""
    own = {
        "classify": [({"text": t, "labels": labels}, answer) for t, labels, answer in CLASSIFY],
        "compare": [({"a": a, "b": b}, answer) for a, b, answer in COMPARE],
    }
    result = []
    for task in TASKS:
        if task in own:
            items = own[task]
        else:
            held = sorted((e for e in examples if e.held_out and e.task == task), key=lambda e: e.key)
            short = [e for e in held if sum(map(len, e.fields.values())) < 900 and len(e.answer) < 600]
            items = [(e.fields, e.answer) for e in short[:PROMPTS_PER_TASK]]
        for i, (fields, answer) in enumerate(items):
            last = i >= len(items) - 2
            phrasing = i % len((HELD_OUT if last else TRAIN)[task])
            prompt = render(task, fields, phrasing, held_out=last)
            result.append({"task": task, "prompt": prompt, "reference": answer})
    return result


@torch.no_grad()
def agreement(model: NanoMoe, folder: Path, examples: list[Example], count: int = 24) -> dict[str, float]:
    """Next-token distributions of the training model and of what transformers loads, on held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    documents = held_out_documents(examples, tokenizer, count // len(TASKS))
    same, total, distance = 0, 0, 0.0
    for d in documents:
        batch = pack([d], len(d.ids), torch.device("cpu"), TASKS)
        hidden, _, _ = model(batch.ids, batch.buckets)
        ours = (hidden @ model.embed_tokens.weight.T).log_softmax(-1)
        other = theirs(batch.ids[None]).logits[0].log_softmax(-1)
        same += int((ours.argmax(-1) == other.argmax(-1)).sum())
        total += len(d.ids)
        distance += float((other.exp() * (other - ours)).sum())
    return {"same_argmax": same / total, "kl_nats_per_token": distance / total}


def write_folder(state: dict[str, Any], tokenizer_folder: Path, folder: Path) -> None:
    shape = Shape(**state["shape"])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(folder)
    config(shape, tokenizer.pad_token_id, tokenizer.eos_token_id).save_pretrained(folder)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=200,
    ).save_pretrained(folder)
    # As on the hub, so that readers older than this transformers understand both files too.
    edit_json(folder / "config.json", num_experts=shape.experts, num_local_experts=None)
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        is_local=None,
        local_files_only=None,
    )
    save_file(tensors(state["model"]), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def edit_json(path: Path, **changes: Any) -> None:
    """Set the given keys; None removes one."""
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {k: v for k, v in values.items() if k not in changes or changes[k] is not None}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def replace_folder(new: Path, target: Path) -> None:
    """By two renames; a reader that holds the old files keeps them."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        if (target / "README.md").exists() and not (new / "README.md").exists():
            shutil.copy(target / "README.md", new / "README.md")
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="the --out folder of training.train")
    parser.add_argument("--to", type=Path, default=Path("src/emoe/nano"))
    args = parser.parse_args()
    state = torch.load(args.state / "state.pt", map_location="cpu", weights_only=False)
    examples = load(args.data)
    temporary = args.to / "checkpoint.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_folder(state, args.state / "tokenizer", temporary)
    model = NanoMoe(Shape(**state["shape"]))
    model.load_state_dict({k: v.bfloat16().float() for k, v in state["model"].items()})
    found = agreement(model.eval(), temporary, examples)
    if found["same_argmax"] < 0.95 or found["kl_nats_per_token"] > 0.01:
        raise SystemExit(f"transformers computes something else from the export: {found}")
    lines = [json.dumps(p, ensure_ascii=False) for p in prompts(examples)]
    replace_folder(temporary, args.to / "checkpoint")
    (args.to / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    size = sum(f.stat().st_size for f in args.to.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc"))
    print(f"step {state['step']}, {state['tokens']:,} tokens, {size:,} bytes, {len(lines)} prompts, {found}")
    if size > MAX_BYTES:
        raise SystemExit(f"{size:,} bytes are more than {MAX_BYTES:,}")


if __name__ == "__main__":
    main()
