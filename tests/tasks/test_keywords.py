"""Keywords: what is learned, what a prompt's task is, and that ties and strangers go to `OTHER`."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.tasks.keywords import OTHER, Keywords, instruction_of, terms
from training.templates import HELD_OUT, TASKS, TRAIN

WORDS = st.sampled_from(["sum", "add", "story", "tell", "me", "a", "count", "the"])
TEXTS = st.lists(WORDS, max_size=12).map(" ".join)
WEIGHTS = st.dictionaries(
    st.sampled_from(["maths", "chat", "code"]),
    st.dictionaries(
        st.one_of(WORDS, st.tuples(WORDS, WORDS).map(" ".join)), st.floats(0.1, 5, allow_nan=False), max_size=5
    ),
    max_size=3,
)


def slow_scores(weights: dict[str, dict[str, float]], prompt: str) -> dict[str, float]:
    """The rule, word for word: for each task the weights of those of its keywords that the prompt holds."""
    words = prompt.split()
    held = {*words, *(f"{a} {b}" for a, b in pairwise(words))}
    sums = {task: [weight for word, weight in each.items() if word in held] for task, each in weights.items()}
    return {task: math.fsum(found) for task, found in sums.items() if found}


@given(WEIGHTS, TEXTS)
def test_a_prompts_scores_are_the_sums_of_its_keywords(weights: dict[str, dict[str, float]], prompt: str) -> None:
    guess = Keywords(weights).extract(prompt)
    expected = slow_scores(weights, prompt)
    assert guess.scores == pytest.approx(expected)
    best = max(expected.values(), default=0.0)
    leaders = [task for task, score in expected.items() if math.isclose(score, best, rel_tol=1e-9)]
    assert guess.task == (leaders[0] if len(leaders) == 1 else OTHER)


@given(WEIGHTS)
def test_json_and_back(weights: dict[str, dict[str, float]]) -> None:
    keywords = Keywords(weights, edge_chars=77)
    again = Keywords.from_json(json.loads(json.dumps(keywords.as_json())))
    assert (again.weights, again.edge_chars) == (keywords.weights, 77)


def test_ties_and_no_match_go_to_other() -> None:
    keywords = Keywords({"maths": {"sum": 0.1, "count": 0.2}, "chat": {"story": 0.3, "tell me": 2.0}})
    assert keywords.extract("Tell ME, please.").task == "chat"
    assert keywords.extract("Tell me: tell me, and tell me!").scores == {"chat": 2.0}, "each counts once"
    assert keywords.extract("tell a, me").task == OTHER
    assert keywords.extract("a story of a sum to count").task == OTHER  # 0.1 + 0.2 against 0.3
    assert keywords.extract("").task == OTHER
    assert keywords.extract("summary").task == OTHER


def test_the_callers_label_wins() -> None:
    keywords = Keywords({"maths": {"sum": 1.0}})
    assert keywords.task_of("the sum") == "maths"
    assert keywords.task_of("the sum", "code") == "code"


def test_only_both_ends_of_a_long_prompt_are_looked_at() -> None:
    keywords = Keywords({"maths": {"sum": 1.0}}, edge_chars=20)
    far = "x " * 40
    assert keywords.extract(f"sum {far}").task == "maths"
    assert keywords.extract(f"{far} sum").task == "maths"
    assert keywords.extract(f"{far} sum {far}").task == OTHER
    # Words of the two ends are not neighbours.
    assert "x y" not in terms("x" + " " * 50 + "y", 10)


def test_what_marks_one_task_becomes_its_keyword_and_common_words_none() -> None:
    rng = random.Random(0)
    filler = ["the", "of", "and", "in", "we", "is"]

    def prompt(marks: str) -> str:
        return " ".join([marks, *rng.sample(filler, 4)])

    pairs = [("sums", prompt("add up")) for _ in range(30)] + [("tales", prompt("tell me")) for _ in range(30)]
    pairs += [(OTHER, prompt("up there")) for _ in range(30)]
    keywords = Keywords.learn(pairs, most=4)
    assert set(keywords.tasks) == {"sums", "tales"}
    assert {"add", "add up"} <= set(keywords.weights["sums"])
    assert {"tell", "me", "tell me"} <= set(keywords.weights["tales"])
    assert not {*filler} & {*keywords.weights["sums"], *keywords.weights["tales"]}
    assert all(len(words) <= 4 for words in keywords.weights.values())


@given(
    st.lists(st.tuples(st.sampled_from(["maths", "chat", OTHER]), TEXTS), min_size=1, max_size=12),
    st.floats(0.5, 20),
    st.sampled_from([0.0, 0.4, 2.0]),
    st.sampled_from([0.0, 0.7, 1.1]),
    st.integers(1, 9),
)
def test_weights_are_the_smoothed_log_odds(
    prompts: list[tuple[str, str]], prior: float, least_z: float, least_odds: float, most: int
) -> None:
    """As written in `learn`: a prior of so many prompts with each word as often as overall, the best by z."""
    learned = Keywords.learn(prompts, most=most, prior_prompts=prior, least_z=least_z, least_odds=least_odds)
    bags = [(task, terms(text, 160)) for task, text in prompts]
    expected: dict[str, dict[str, float]] = {}
    for task in sorted({task for task, _ in bags} - {OTHER}):
        mine, others = [bag for t, bag in bags if t == task], [bag for t, bag in bags if t != task]
        found = []
        for word in sorted(set().union(*mine)):
            share = sum(word in bag for _, bag in bags) / len(bags)
            with_, without = sum(word in bag for bag in mine) + prior * share, prior * share
            without += sum(word in bag for bag in others)
            odds = math.log(with_ / (len(mine) + prior - with_ + 0.5)) - math.log(
                without / (len(others) + prior - without + 0.5)
            )
            z = odds / math.sqrt(1 / with_ + 1 / without)
            if abs(z - least_z) < 1e-9 or abs(odds - max(0.0, least_odds)) < 1e-9:
                return  # either answer is right
            if z > least_z and odds > max(0.0, least_odds):
                found.append((z, word, odds))
        found.sort(key=lambda each: (-each[0], each[1]))
        if len(found) > most and found[most - 1][0] - found[most][0] < 1e-9:
            return
        expected[task] = {word: odds for _, word, odds in found[:most]}
    assert {task: set(words) for task, words in learned.weights.items()} == {t: set(w) for t, w in expected.items()}
    for task, words in expected.items():
        assert learned.weights[task] == pytest.approx(words, abs=1e-4)


def test_how_much_is_looked_at_is_learned_and_kept() -> None:
    long = "start " + "middle " * 20 + "end"
    learned = Keywords.learn([("a", long), (OTHER, "none")] * 30, edge_chars=8)
    assert learned.edge_chars == 8
    assert {"start", "end"} <= set(learned.weights["a"])
    assert "middle middle" not in learned.weights["a"]
    with pytest.raises(UsageError, match="edge_chars is 0, but at least 1 character"):
        Keywords({}, edge_chars=0)
    assert terms("ab", 1) == {"ab"}  # both ends meet: nothing is cut
    assert terms("a b", 1) == {"a", "b"}


def test_learning_is_the_same_for_any_order_of_prompts() -> None:
    pairs = [(task, text.replace("{text}", "some words")) for task in TASKS for text in TRAIN[task]] * 3
    shuffled = random.Random(1).sample(pairs, len(pairs))
    assert Keywords.learn(pairs).weights == Keywords.learn(shuffled).weights


def test_phrasings_never_seen_are_mostly_recognised() -> None:
    """Bare instructions; bench/task_keywords.py measures real prompts."""
    blank = dict.fromkeys(("text", "a", "b", "question", "labels"), "")
    learn = [(task, text.format(**blank)) for task in TASKS for text in TRAIN[task] if text != "{text}"] * 5
    keywords = Keywords.learn(learn)
    new = [(task, text.format(**blank)) for task in TASKS for text in HELD_OUT[task]]
    right = sum(keywords.extract(text).task == task for task, text in new)
    assert right / len(new) > 0.75  # 1/8 by chance


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({OTHER: {"sum": 1.0}}, "'other'"),
        ({"maths": {"Sum": 1.0}}, "can never match"),
        ({"maths": {"one two three": 1.0}}, "can never match"),
        ({"maths": {"": 1.0}}, "can never match"),
        ({"maths": {"sum": 0.0}}, "not a number above 0"),
        ({"maths": {"sum": float("nan")}}, "not a number above 0"),
        ({"maths": {"sum": "1"}}, "not a number above 0"),
        ({"maths": {"sum": True}}, "not a number above 0"),
        ({"maths": {"sum": math.inf}}, "not a number above 0"),
        ({"maths": {"tell  me": 1.0}}, "can never match"),
    ],
)
def test_edits_that_could_never_work_are_refused(weights: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Keywords(weights)


def test_a_conversation_is_about_its_last_question() -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Add 2 and 2."},
        {"role": "assistant", "content": "4"},
    ]
    assert instruction_of(talk) == "Add 2 and 2."
    assert instruction_of(talk[:1]) == "Be brief."
    assert instruction_of(talk[:3]) == "Hello."
    assert instruction_of([]) == ""
