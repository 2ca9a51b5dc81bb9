"""The longest prompt and the largest batch that a plan allows."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.bench.reach import largest_batch, longest_prompt
from emoe.cli import main
from emoe.config import ExpertMemory
from emoe.errors import UsageError
from emoe.planner import facts_of, plan

FACTS = facts_of()[1]


@settings(max_examples=20)
@given(share=st.sampled_from([0.3, 0.6, 0.9]), prompt=st.integers(8, 200), new=st.integers(1, 30))
def test_one_token_or_sequence_more_would_not_fit(share: float, prompt: int, new: int) -> None:
    memory = ExpertMemory("share", share)

    def needed(prompt: int, batch: int, chunk: int | None, memory: ExpertMemory) -> int:
        return plan(expert_memory=memory, context=prompt + new, prompt=prompt, batch=batch, chunk=chunk).total_bytes

    everything = ExpertMemory("share", 1.0)
    found = longest_prompt(FACTS, memory, prompt, new, 64)
    assert found.memory_bytes == needed(prompt, 1, None, everything)
    assert found.found >= prompt
    assert needed(found.found, 1, found.chunk, memory) <= found.memory_bytes
    if found.bound_by == "memory":
        assert needed(found.found + 1, 1, found.chunk, memory) > found.memory_bytes
    else:
        assert found.found + new == FACTS.max_context
    many = largest_batch(FACTS, memory, prompt, new, 4)
    assert many.memory_bytes == needed(prompt, 4, None, everything)
    assert needed(prompt, many.found, None, memory) <= many.memory_bytes < needed(prompt, many.found + 1, None, memory)
    assert many.freed_bytes == needed(prompt, 4, None, everything) - needed(prompt, 4, None, memory)


def test_passes_reach_further_than_one() -> None:
    memory = ExpertMemory("share", 0.9)
    one, many = (longest_prompt(FACTS, memory, 64, 8, chunk) for chunk in (None, 16))
    assert (one.chunk, many.chunk) == (None, 16)
    assert many.found > one.found


def test_the_command_prints_the_arithmetic_and_what_measures_it(capsys: pytest.CaptureFixture[str]) -> None:
    from emoe import nano

    assert main(["bench", "reach", str(nano.path()), "--prompt", "64", "--budget", "90", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [one["what"] for one in values["reach"]] == ["prompt"] * 4 + ["batch"]
    assert main(["bench", "reach", str(nano.path()), "--prompt", "64", "--budget", "90"]) == 0
    out = capsys.readouterr()
    assert "longest prompt" in out.out
    assert "--budget 90 --prompt 64 --run prompt,batch" in out.err


def test_prompts_beyond_the_positions_are_refused() -> None:
    with pytest.raises(UsageError, match=r"are more than the model's \d+ positions"):
        longest_prompt(FACTS, ExpertMemory("share", 0.6), 10**6, 8)
