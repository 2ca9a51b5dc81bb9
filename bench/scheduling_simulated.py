"""The live runs of bench/scheduling.py in the simulator: same requests, same answers, the live engine's costs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import emoe
from emoe import nano
from emoe.bench.serve.targets import Book
from emoe.bench.serve.workload import Planned
from emoe.config import ExpertMemory
from emoe.model.bind import binding_of, label_task
from emoe.residency.budget import PoolPlan
from emoe.routing.trace import Trace
from emoe.simulation.serving import SimulationSettings, simulate_serving
from emoe.simulation.serving_results import ServingResults
from emoe.simulation.serving_traffic import Call, Routes
from emoe.tasks.profile import Profile


class Simulated:
    """Routes and lengths of every prompt's answer, and the slots that the budget gives."""

    def __init__(self, budget: str, max_tokens: int, max_running: int) -> None:
        """Answer each of emoe-nano's prompts once, alone and greedily, and record what its tokens are routed to."""
        self._profile = Profile.read(nano.profile_path())
        self._max_tokens = max_tokens
        self._max_running = max_running
        prompts = nano.prompts()
        self.lengths: dict[str, tuple[int, int]] = {}
        self.answers: dict[str, float] = {}
        """Tokens of the mean answer, by task."""
        self._numbers: dict[str, int] = {}
        counts: dict[str, int] = {}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.npz"
            model, tokenizer = emoe.load(expert_memory=ExpertMemory.parse(budget), trace=file)
            if tokenizer is None:
                raise RuntimeError("emoe-nano has come without its tokenizer")
            self.bank: PoolPlan = binding_of(model).plan.pools[0]
            for each in prompts:
                task, text = each["task"], each["prompt"]
                turn = [{"role": "user", "content": text}]
                ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
                label_task(model, task)
                given = torch.tensor([ids])
                with torch.no_grad():
                    whole = model.generate(
                        given, attention_mask=torch.ones_like(given), max_new_tokens=max_tokens, do_sample=False
                    )
                self.lengths[text] = len(ids), whole.shape[1] - len(ids)
                self._numbers[text] = counts.get(task, 0)
                counts[task] = counts.get(task, 0) + 1
            emoe.close(model)
            for task in counts:
                mine = [self.lengths[each["prompt"]][1] for each in prompts if each["task"] == task]
                self.answers[task] = sum(mine) / len(mine)
            self.routes = Routes.of_trace(Trace.read(file))

    def run(
        self, scheduler: str, requests: Sequence[Planned], book: Book, costs: Mapping[str, float]
    ) -> ServingResults:
        """One run on the virtual clock."""
        settings = SimulationSettings(
            scheduler=scheduler, max_running=self._max_running, bank=self.bank, costs=dict(costs)
        )
        calls = [self._call(request, book) for request in requests]
        return simulate_serving(calls, self.routes, settings, shares=self._profile.popularity_of)

    def _call(self, request: Planned, book: Book) -> Call:
        entry, answer = self.lengths[request.prompt]
        lengths = self._profile.lengths_of(request.label)
        targets = book.of(request.task)
        return Call(
            at_s=request.at_s,
            input_tokens=entry,
            output_tokens=answer,
            task=request.task or "",
            label=request.label,
            expected_tokens=min(float(self._max_tokens), lengths.mean if lengths else self._max_tokens),
            ttft_slo_s=targets.ttft_s,
            tpot_slo_s=targets.tpot_s,
            prompt=self._numbers[request.prompt],
            max_tokens=self._max_tokens,
        )
