"""A prompt's final layer runs the tokens whose logits are asked for, and nobody can tell from the logits."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import emoe
from emoe.model import final
from emoe.model.bind import binding_of
from emoe.model.layer import LayerRuntime
from emoe.routing.final import ends_row_by_row
from emoe.routing.trace import FINAL_LAYER, PREFILL, Trace
from tests.families import FAMILIES, make_checkpoint
from tests.model.test_exact import batch_of, logits_of

PROMPT = torch.arange(5, 45)[None]
BATCH = {"input_ids": torch.arange(5, 23).reshape(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}


def poison(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the final layer's experts give what nobody may read for the tokens that it does not run; their numbers."""
    runtime = binding_of(model).runtime
    run, left = runtime.run, []

    def poisoned(layer: LayerRuntime, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        out = run(layer, hidden, ids, gates)
        rows = runtime.answering_of(layer, hidden.shape[0])
        if rows is not None:
            unused = [row for row in range(hidden.shape[0]) if row not in rows]
            left.append(len(unused))
            out[unused] = torch.nan
        return out

    monkeypatch.setattr(runtime, "run", poisoned)
    return left


def run_tokens(model: Any, **inputs: Any) -> list[int]:
    """Tokens that each layer ran in one call."""
    before = {n: layer["routed_tokens"] for n, layer in emoe.stats(model)["layers"].items()}
    with torch.no_grad():
        model(**inputs)
    return [layer["routed_tokens"] - before[n] for n, layer in sorted(emoe.stats(model)["layers"].items())]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_no_family_reads_what_is_left_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every family: what the final layer did not compute is NaN, and no logit of the prompt or after it is."""
    model, _ = emoe.load(make_checkpoint(name, tmp_path, seed=3), expert_memory="70%")
    inputs = batch_of(1, 2, 9)
    whole = logits_of(model, inputs, 3)
    left = poison(model, monkeypatch)
    for kept in (1, 3):
        for ours, all_of_them in zip(logits_of(model, inputs, 3, kept), whole, strict=True):
            torch.testing.assert_close(ours, all_of_them[:, -kept:], rtol=2e-4, atol=2e-4)
    assert left == ([2 * 8, 2 * 6] if binding_of(model).runtime.final else [])
    emoe.close(model)


def test_a_family_that_looks_at_other_tokens_afterwards_would_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inkling 2 puts a convolution over tokens behind its experts: run as the others, it gives NaN."""
    if "inkling2_text" not in FAMILIES:
        pytest.skip("this transformers does not know Inkling 2")
    path = make_checkpoint("inkling2_text", tmp_path, seed=3)
    for everywhere in (False, True):
        if everywhere:
            monkeypatch.setattr(final, "ends_row_by_row", lambda _model_type: True)
        model, _ = emoe.load(path, expert_memory="70%")
        left = poison(model, monkeypatch)
        assert logits_of(model, batch_of(1, 2, 9), 1, 1)[0].isnan().any() == bool(left) == everywhere
        emoe.close(model)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_named_but_one(name: str) -> None:
    assert ends_row_by_row(FAMILIES[name].config().get_text_config(decoder=True).model_type) == (
        name != "inkling2_text"
    )


def test_most_families_have_such_a_layer(tmp_path: Path) -> None:
    """Where the last decoder layer has no experts every token is run: its attention reads what experts before made."""
    without = set()
    for name in ("qwen3_moe", "mixtral", "gpt_oss", "olmoe", "deepseek_v3", "jamba"):
        model, _ = emoe.load(make_checkpoint(name, tmp_path / name, seed=3), expert_memory="70%")
        final, layers = binding_of(model).runtime.final, model.config.get_text_config().num_hidden_layers
        assert final is None or final.layer == layers - 1 == max(binding_of(model).runtime.layers)
        if final is None:
            without.add(name)
            assert layers - 1 not in binding_of(model).runtime.layers
        emoe.close(model)
    assert without <= {"jamba"}


def test_what_is_asked_for_decides(tmp_path: Path) -> None:
    model, _ = emoe.load(expert_memory="60%")
    *_, all_of_them = run_tokens(model, input_ids=PROMPT)
    assert all_of_them == 40
    assert run_tokens(model, input_ids=PROMPT, logits_to_keep=1) == [40] * 5 + [1]
    assert run_tokens(model, **BATCH, logits_to_keep=1) == [18] * 5 + [2]
    assert run_tokens(model, **BATCH, logits_to_keep=4) == [18] * 5 + [8]
    for whole in (
        {"logits_to_keep": 0},
        {"logits_to_keep": 9},
        {"logits_to_keep": torch.tensor([3, 8])},
        {"logits_to_keep": 1, "output_hidden_states": True},
    ):
        assert run_tokens(model, **BATCH, **whole) == [18] * 6
    seen: list[torch.Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    assert run_tokens(model, **BATCH, logits_to_keep=1) == [18] * 6
    hook.remove()
    assert run_tokens(model, **BATCH, logits_to_keep=1) == [18] * 5 + [2]
    model.config.output_hidden_states = True
    assert run_tokens(model, **BATCH, logits_to_keep=1) == [18] * 6
    assert run_tokens(model, **BATCH, logits_to_keep=1, output_hidden_states=False) == [18] * 5 + [2]
    emoe.close(model)


def test_generate_asks_for_one_and_gives_whole_states_when_they_are_asked_for() -> None:
    model, _ = emoe.load(expert_memory="60%")
    plain, _ = emoe.load()
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    before = emoe.stats(model)["layers"]
    out = model.generate(**BATCH, **settings)
    after = emoe.stats(model)["layers"]
    grown = [after[n]["routed_tokens"] - before[n]["routed_tokens"] for n in sorted(after)]
    assert grown == [2 * (9 + 2)] * 5 + [2 * (1 + 2)]
    with_states = model.generate(**BATCH, **settings, output_hidden_states=True)
    expected = plain.generate(**BATCH, **settings, output_hidden_states=True)
    assert torch.equal(out.sequences, with_states.sequences)
    assert torch.equal(with_states.hidden_states[0][-1], expected.hidden_states[0][-1])
    assert with_states.hidden_states[0][-1].shape[1] == 9
    emoe.close(model)
    emoe.close(plain)


@pytest.mark.parametrize("memory", ["30%", "60%"])
def test_the_final_layer_loads_what_its_token_needs(memory: str) -> None:
    """A first prompt fills the layer's empty slots; later ones load at most one token's experts there."""
    model, _ = emoe.load(expert_memory=memory)
    top_k, last = model.config.num_experts_per_tok, max(emoe.stats(model)["layers"])
    loads = []
    for start in (5, 60, 120):
        before = emoe.stats(model)["layers"][last]["loads"]
        with torch.no_grad():
            model(input_ids=PROMPT + start, logits_to_keep=1)
        loads.append(emoe.stats(model)["layers"][last]["loads"] - before)
    assert loads[0] >= top_k
    assert max(loads[1:]) <= top_k
    table = binding_of(model).runtime.layers[last].pool.table
    assert len(table.resident(last)) >= min(table.share(last), top_k)
    emoe.close(model)


@pytest.mark.parametrize(("batch", "kept"), [(1, 1), (4, 1), (2, 3)])
def test_a_prompt_that_plans_still_fills_the_final_layer(batch: int, kept: int) -> None:
    """Mode resident keeps in every layer what the whole prompt chose most, in the last one too."""
    model, _ = emoe.load(expert_memory="50%", mode="resident")
    runtime = binding_of(model).runtime
    last = max(runtime.layers)
    chosen: list[torch.Tensor] = []
    runtime.observers.append(lambda _pass, layer, ids, _w: chosen.append(ids) if layer == last else None)
    with torch.no_grad():
        model(input_ids=PROMPT.reshape(batch, -1), logits_to_keep=kept)
    counts = torch.bincount(chosen[0].reshape(-1), minlength=runtime.layers[last].experts).tolist()
    assert len(chosen[0]) == 40
    quota = runtime.layers[last].pool.table.plan.quotas[last]
    best = sorted(range(len(counts)), key=lambda e: (-counts[e], e))[:quota]
    assert set(runtime.layers[last].pool.table.resident(last)) == {e for e in best if counts[e]}
    assert runtime.layers[last].prompt_counts == counts
    emoe.close(model)


@pytest.mark.parametrize("more", [{}, {"logits_to_keep": 3}])
def test_a_trace_has_every_route_and_says_which_layer_ran_one_token(tmp_path: Path, more: dict[str, int]) -> None:
    model, _ = emoe.load(expert_memory="60%", trace=tmp_path / "kept.npz")
    with torch.no_grad():
        model(input_ids=PROMPT, logits_to_keep=1)
    last = max(binding_of(model).runtime.layers)
    emoe.close(model)
    trace = Trace.read(tmp_path / "kept.npz")
    assert trace.computed.all() and int((trace.phase == PREFILL).sum()) == 40
    assert trace.source[FINAL_LAYER] == last

    model, _ = emoe.load(expert_memory="60%", trace=tmp_path / "whole.npz")
    with torch.no_grad():
        model(input_ids=PROMPT, logits_to_keep=1)
        model(input_ids=PROMPT, **more)
    emoe.close(model)
    assert FINAL_LAYER not in Trace.read(tmp_path / "whole.npz").source


def test_threads_that_ask_one_model_at_once_get_what_they_asked_for() -> None:
    """Passes of as many tokens, of other shapes: each runs its own rows, whichever thread's pass began last."""
    model, _ = emoe.load(expert_memory="60%")
    asked = [{"input_ids": PROMPT, "logits_to_keep": 1}, {"input_ids": PROMPT.reshape(4, 10), "logits_to_keep": 1}]
    asked.append({"input_ids": PROMPT.reshape(2, 20)})
    with torch.no_grad():
        expected = [model(**each).logits for each in asked]
    wrong: list[int] = []
    together = threading.Barrier(len(asked))

    def ask(which: int) -> None:
        with torch.no_grad():
            for _ in range(6):
                together.wait()
                if not torch.equal(model(**asked[which]).logits, expected[which]):
                    wrong.append(which)

    threads = [threading.Thread(target=ask, args=(which,)) for which in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    emoe.close(model)


@pytest.mark.parametrize("fails", [False, True])
def test_calls_of_what_is_inside_run_every_token(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call of the model asked for holds for that call, also where it failed."""
    model, _ = emoe.load(expert_memory="60%")
    with torch.no_grad():
        states, logits = model.model(PROMPT).last_hidden_state, model(PROMPT).logits
        if fails:
            with monkeypatch.context() as broken:
                broken.setattr(model.lm_head, "forward", lambda _states: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    model(PROMPT, logits_to_keep=1)
        else:
            model(PROMPT, logits_to_keep=1)
        assert torch.equal(model.model(PROMPT).last_hidden_state, states)
        assert torch.equal(model.forward(PROMPT).logits, logits)
    emoe.close(model)


def test_what_the_tokens_missed_is_no_hit_when_the_layer_is_filled() -> None:
    model, _ = emoe.load(expert_memory="60%")
    with torch.no_grad():
        model(PROMPT, logits_to_keep=1)
    first, *_, last = (layer for _, layer in sorted(emoe.stats(model)["layers"].items()))
    assert (first["hits"], last["hits"]) == (0, 0)
    assert last["misses"] == last["loads"]
    emoe.close(model)


def test_a_hook_on_every_module_sees_every_token() -> None:
    model, _ = emoe.load(expert_memory="60%")
    hook = torch.nn.modules.module.register_module_forward_hook(lambda _m, _a, _o: None)
    try:
        assert run_tokens(model, **BATCH, logits_to_keep=1) == [18] * 6
    finally:
        hook.remove()
    assert run_tokens(model, **BATCH, logits_to_keep=1) == [18] * 5 + [2]
    emoe.close(model)
