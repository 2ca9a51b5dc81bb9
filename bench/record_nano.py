"""Record a routing trace of emoe-nano over prompts of every task, labelled with their tasks.

    python -m bench.record_nano OUT --data DIR [--side history|held-out] [--prompts 600] [--tokens 28] [--seed 0]

DIR holds the task sets that `training/data.py` reads. `history` takes examples of training's side in its phrasings;
`held-out` takes examples that training never saw, in phrasings that it never saw. Tasks take turns in random order.
Each prompt is answered greedily for `--tokens` tokens at most.
"""

from __future__ import annotations

from pathlib import Path

import torch

import emoe
from bench.task_prompts import Row, chosen_by, parser_for
from emoe.model.bind import label_task
from training.tokenizer import prompt_text

MAX_PROMPT_TOKENS = 384  # what emoe-nano was trained on


@torch.no_grad()
def record(out: Path, prompts: list[Row], tokens: int) -> None:
    """Answer every prompt with all experts resident, and write the routes to `out`."""
    model, tokenizer = emoe.load(trace=out)
    for number, (task, prompt, _) in enumerate(prompts):
        ids = tokenizer.encode(prompt_text(prompt), add_special_tokens=False)
        if len(ids) > MAX_PROMPT_TOKENS:
            ids = ids[: MAX_PROMPT_TOKENS // 2] + ids[-MAX_PROMPT_TOKENS // 2 :]
        label_task(model, task)
        given = torch.tensor([ids])
        model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False)
        if (number + 1) % 50 == 0:
            print(f"{number + 1}/{len(prompts)} prompts", flush=True)
    emoe.model.close(model)


def main() -> None:
    """Write one trace."""
    parser = parser_for(__doc__)
    parser.add_argument("--tokens", type=int, default=28)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record(options.out, chosen_by(options), options.tokens)


if __name__ == "__main__":
    main()
