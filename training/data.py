"""The permissive sets of `shared/data/tasks` as examples: fields for a template, an answer, a side of the
split.

Splits are by hash, never by order: qa and ask by Wikipedia article, compare by its first sentence, the
rest by the text of the input. `python -m training.data --data DIR` prints what there is."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.templates import TASKS

MAX_SOURCE_CHARS = 1150  # an abstract longer than this is cut at a sentence end; about 320 tokens
MAX_PASSAGE_CHARS = 480
MAX_ANSWER_CHARS = 800
HELD_OUT_PERCENT = 6
SOURCES = {
    "SciTLDR": "Apache-2.0",
    "TweetEval (emotion, sentiment)": "labels and texts for research use; no text shipped",
    "XQuAD (English)": "CC BY-SA 4.0",
    "SQuAD 1.1 (sentence and question pairs of its development set)": "CC BY-SA 4.0",
    "STS-B": "scores CC BY-SA; mixed texts, none shipped",
    "GPTeacher (role-play, code)": "MIT",
    "Self-Instruct (seed and user-oriented tasks)": "Apache-2.0",
    "MBPP": "CC BY 4.0",
    "GSM8K": "MIT",
}


@dataclass(frozen=True)
class Example:
    task: str
    source: str
    fields: dict[str, str]
    answer: str
    held_out: bool

    @property
    def key(self) -> str:
        return digest(self.task + json.dumps(self.fields, sort_keys=True) + self.answer)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def percent(text: str) -> float:
    return int(digest(text)[:8], 16) / 2**32 * 100


def rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def normal(text: str) -> str:
    """For matching only: letters and digits, lower case."""
    return re.sub(r"[^a-z0-9]+", " ", re.sub(r"-[lr][rs]b-", "", text.lower())).strip()


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z\"“(])", text.strip()) if s]


def cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head = text[:limit]
    end = max(head.rfind(". "), head.rfind("? "), head.rfind("! "), head.rfind(".\n"))
    return head[: end + 1] if end > limit // 3 else head[: head.rfind(" ")]


def summarise(root: Path) -> Iterator[Example]:
    for name in ("scitldr_train", "scitldr_dev"):
        for row in rows(root / "summarise" / f"{name}.jsonl.gz"):
            held = percent(row["paper_id"]) < HELD_OUT_PERCENT
            targets = row["target"] if isinstance(row["target"], list) else [row["target"]]
            for target in targets[:1] if held else targets:
                fields = {"text": cut(row["source"].strip(), MAX_SOURCE_CHARS)}
                yield Example("summarise", "SciTLDR", fields, target.strip(), held)


def classify(root: Path) -> Iterator[Example]:
    sets = {
        "tweet_emotion_train": "anger, joy, optimism or sadness",
        "tweet_emotion_val": "anger, joy, optimism or sadness",
        "tweet_sentiment_val": "negative, neutral or positive",
    }
    for name, labels in sets.items():
        for row in rows(root / "classify" / f"{name}.jsonl.gz"):
            text = re.sub(r"\s+", " ", row["text"]).strip()
            held = percent(normal(text)) < HELD_OUT_PERCENT
            yield Example("classify", "TweetEval", {"text": text, "labels": labels}, row["name"], held)


def compare(root: Path) -> Iterator[Example]:
    for name in ("stsb_train", "stsb_dev"):
        for row in rows(root / "compare" / f"{name}.jsonl.gz"):
            held = percent(normal(row["a"])) < HELD_OUT_PERCENT
            yield Example("compare", "STS-B", {"a": row["a"], "b": row["b"]}, f"{row['score']:.1f}", held)


def compare_made(examples: list[Example]) -> Iterator[Example]:
    """The two ends of the scale, which need no judge: a sentence with itself, and with one of another pair."""
    pairs = [e.fields for e in examples if not e.held_out]
    rng = random.Random(1)
    for i, pair in enumerate(pairs):
        if i % 4 == 0:
            yield Example("compare", "STS-B, made", {"a": pair["a"], "b": pair["a"]}, "5.0", False)
        elif i % 4 == 2:
            other = rng.choice(pairs)["b"]
            yield Example("compare", "STS-B, made", {"a": pair["a"], "b": other}, "0.0", False)


def converse(root: Path) -> Iterator[Example]:
    for row in rows(root / "converse" / "gpteacher_roleplay.jsonl.gz"):
        text = f"{row['instruction']} {row['input']}".strip()
        held = percent(normal(text)) < HELD_OUT_PERCENT
        yield Example("converse", "GPTeacher", {"text": text}, cut(row["response"].strip(), MAX_ANSWER_CHARS), held)
    for name in ("selfinstruct_seed", "selfinstruct_user"):
        for row in rows(root / "converse" / f"{name}.jsonl.gz"):
            for instance in row["instances"][:3]:
                text = f"{row['instruction']}\n{instance['input']}".strip()
                if len(text) > 900 or not instance["output"].strip():
                    continue
                held = percent(normal(row["instruction"])) < HELD_OUT_PERCENT
                answer = cut(instance["output"].strip(), MAX_ANSWER_CHARS)
                yield Example("converse", "Self-Instruct", {"text": text}, answer, held)


def code(root: Path) -> Iterator[Example]:
    for row in rows(root / "code" / "gpteacher_codegen.jsonl.gz"):
        text = f"{row['instruction']}\n{row['input']}".strip()
        answer = row["response"].strip().replace("\r\n", "\n").replace("\t", "    ")
        if len(text) > 900 or len(answer) > 1000 or not answer:
            continue
        held = percent(normal(row["instruction"])) < HELD_OUT_PERCENT
        yield Example("code", "GPTeacher", {"text": text}, answer, held)
    for row in rows(root / "code" / "mbpp.jsonl.gz"):
        answer = row["code"].strip().replace("\r\n", "\n").replace("\t", "    ")
        tests = "\n".join(row["test_list"][:1]).replace("\r\n", "\n")
        if len(answer) > 1000 or len(tests) > 400:
            continue
        held = percent(f"mbpp {row['task_id']}") < HELD_OUT_PERCENT
        yield Example("code", "MBPP", {"text": f"{row['text'].strip()}\nTest: {tests}"}, answer, held)


def maths(root: Path) -> Iterator[Example]:
    for row in rows(root / "maths" / "gsm8k_train.jsonl.gz"):
        answer = re.sub(r"<<[^>]*>>", "", row["answer"]).replace("#### ", "Answer: ")
        held = percent(normal(row["question"])) < HELD_OUT_PERCENT
        yield Example("maths", "GSM8K", {"text": row["question"].strip()}, answer.strip(), held)


def title_held_out(title: str) -> bool:
    return percent(f"title {title}") < 9


def window(context: str, start: int, answer: str, rng: random.Random, limit: int = MAX_PASSAGE_CHARS) -> str:
    """The sentence with the answer, and neighbours on random sides while they fit."""
    parts = sentences(context)
    at, hit, offset = [], 0, 0
    for i, part in enumerate(parts):
        offset = context.index(part, offset)
        at.append(offset)
        if offset <= start:
            hit = i
    lo = hi = hit
    while at[hi] + len(parts[hi]) < start + len(answer) and hi + 1 < len(parts):
        hi += 1
    while lo > 0 or hi + 1 < len(parts):
        left = rng.random() < 0.5
        new_lo, new_hi = (lo - 1, hi) if (left and lo > 0) or hi + 1 == len(parts) else (lo, hi + 1)
        if at[new_hi] + len(parts[new_hi]) - at[new_lo] > limit:
            break
        lo, hi = new_lo, new_hi
    return context[at[lo] : at[hi] + len(parts[hi])]


def xquad(root: Path) -> Iterator[Example]:
    """Held out: real questions on articles of which no paragraph, sentence or question is trained on."""
    for row in rows(root / "qa" / "xquad_en_train.jsonl.gz"):
        held = title_held_out(row["title"])
        context, answer = row["context"], row["answer"]
        start = context.find(answer, max(0, row["start"] - 2))
        for i in range(1 if held else 3):
            text = window(context, max(start, 0), answer, random.Random(row["id"] + str(i)))
            if answer in text:
                yield Example("qa", "XQuAD", {"text": text, "question": row["question"].strip()}, answer, held)


def cloze(root: Path) -> Iterator[Example]:
    """From the same passages: a name or number is blanked out of a sentence and is to be found again."""
    seen: set[str] = set()
    for row in rows(root / "qa" / "xquad_en_train.jsonl.gz"):
        if title_held_out(row["title"]) or row["context"] in seen:
            continue
        seen.add(row["context"])
        yield from cloze_of(row["context"], "XQuAD")
    for row in rows(root / "summarise" / "scitldr_train.jsonl.gz"):
        if percent(row["paper_id"]) >= HELD_OUT_PERCENT:
            yield from cloze_of(row["source"], "SciTLDR", most=2)


def cloze_of(context: str, source: str, most: int = 8) -> Iterator[Example]:
    rng = random.Random(digest(context))
    parts = sentences(context)
    spans = [
        (s, m) for s in parts for m in re.finditer(r"(?<=[a-z,] )(?:[A-Z][\w'-]+(?: [A-Z][\w'-]+)*|\d[\d,.]*\d)", s)
    ]
    rng.shuffle(spans)
    for sentence, match in spans[:most]:
        words = sentence.split()
        before = sentence[: match.start()].split()[-rng.randint(3, 8) :]
        after = sentence[match.end() :].split()[: rng.randint(2, 7)]
        if len(words) < 7:
            continue
        start = context.find(sentence) + match.start()
        question = f'which words fill the gap in "{" ".join(before)} ___ {" ".join(after)}"?'
        text = window(context, start, match.group(), rng)
        if match.group() in text:
            yield Example("qa", f"{source}, cloze", {"text": text, "question": question}, match.group(), False)


def untokenise(text: str) -> str:
    """The SQuAD pairs are lower-cased and space-separated; put the spaces back where prose has them."""
    for name, sign in (("-lrb-", "("), ("-rrb-", ")"), ("-lsb-", "["), ("-rsb-", "]")):
        text = text.replace(name, sign)
    text = text.replace("``", '"').replace("''", '"')
    text = re.sub(r" ([.,;:?!%)\]])", r"\1", text)
    text = re.sub(r"([(\[$£]) ", r"\1", text)
    return re.sub(r" ('(?:s|re|ve|ll|d|m|t)?\b|n't|--)", r"\1", text).strip()


def squad_pairs(root: Path) -> list[tuple[str, str, bool]]:
    """(sentence, question, held out). The file keeps the order of the articles but not their names, so
    XQuAD's questions, which are SQuAD's, tell which rows lie in which article; rows between two articles are
    held out if either is."""
    pairs = [(row["sentence"], row["question"]) for row in rows(root / "qa" / "squad_sentence_question_dev.jsonl.gz")]
    titles = {normal(r["question"]): r["title"] for r in rows(root / "qa" / "xquad_en_train.jsonl.gz")}
    known = [titles.get(normal(question)) for _, question in pairs]
    held_text = " ".join(
        normal(r["context"]) for r in rows(root / "qa" / "xquad_en_train.jsonl.gz") if title_held_out(r["title"])
    )
    before: list[str | None] = []
    for title in known:
        before.append(title or (before[-1] if before else None))
    after: list[str | None] = []
    for title in reversed(known):
        after.append(title or (after[-1] if after else None))
    result = []
    for (sentence, question), b, a in zip(pairs, before, reversed(after), strict=True):
        held = any(t is not None and title_held_out(t) for t in (a, b)) or normal(sentence) in held_text
        result.append((untokenise(sentence), untokenise(question), held))
    return result


def ask(root: Path) -> Iterator[Example]:
    for sentence, question, held in squad_pairs(root):
        if len(sentence) <= 500:
            yield Example("ask", "SQuAD", {"text": sentence}, question, held)


def squad_qa(root: Path) -> Iterator[Example]:
    """Quote the sentence that answers; where there is one candidate only, give the year or the number."""
    pairs = squad_pairs(root)
    order = list(dict.fromkeys(s for s, _, _ in pairs))
    place = {s: i for i, s in enumerate(order)}
    for sentence, question, held in pairs:
        if held:
            continue
        rng = random.Random(sentence + question)
        i, span = place[sentence], rng.randint(2, 4)
        lo = max(0, i - rng.randint(0, span - 1))
        text = " ".join(order[lo : lo + span])
        if len(text) > MAX_PASSAGE_CHARS:
            text = sentence
        if len(text) > MAX_PASSAGE_CHARS:
            continue
        if text != sentence and rng.random() < 0.35:
            quoted = "quote the sentence that answers: " + question
            yield Example("qa", "SQuAD, quote", {"text": text, "question": quoted}, sentence, False)
        years = re.findall(r"\b1\d{3}\b|\b20\d\d\b", sentence)
        numbers = re.findall(r"\b\d[\d,.]*\d\b|\b\d\b", sentence)
        if re.search(r"\b(when|what year|which year)\b", question) and len(years) == 1:
            yield Example("qa", "SQuAD, year", {"text": text, "question": question}, years[0], False)
        elif re.search(r"\bhow (many|much)\b", question) and len(numbers) == 1:
            yield Example("qa", "SQuAD, number", {"text": text, "question": question}, numbers[0], False)


def load(root: Path) -> list[Example]:
    """Every example once, in a fixed order; an input seen on the training side is never held out."""
    makers = (summarise, classify, xquad, cloze, squad_qa, ask, compare, converse, code, maths)
    unique: dict[str, Example] = {}
    for maker in makers:
        for example in maker(root):
            unique.setdefault(example.key, example)
    for example in compare_made([e for e in unique.values() if e.task == "compare"]):
        unique.setdefault(example.key, example)
    examples = list(unique.values())
    trained = {e.task + normal(json.dumps(e.fields)) for e in examples if not e.held_out}
    return [e for e in examples if not e.held_out or e.task + normal(json.dumps(e.fields)) not in trained]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    examples = load(parser.parse_args().data)
    for task in TASKS:
        mine = [e for e in examples if e.task == task]
        by_source: dict[str, int] = {}
        for e in mine:
            if not e.held_out:
                by_source[e.source] = by_source.get(e.source, 0) + 1
        held = sum(e.held_out for e in mine)
        print(f"{task:10} train {len(mine) - held:6} held out {held:5}  {by_source}")


if __name__ == "__main__":
    main()
