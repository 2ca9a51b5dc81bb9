"""What to type instead: for commands and options that other tools have, and for what is mistyped."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence

_COMMANDS = {
    "run": "`emoe chat MODEL` talks, `emoe generate MODEL -p TEXT` answers one prompt",
    "complete": "`emoe generate MODEL -p TEXT`",
    "cli": "`emoe chat MODEL` or `emoe generate MODEL -p TEXT`",
    "server": "`emoe serve MODEL`",
    "start": "`emoe serve MODEL`",
    "pull": "nothing to do: a hub id in the place of MODEL is fetched when it is first used",
    "convert": "nothing to do: checkpoints are read as they are",
    "show": "`emoe plan MODEL` or `emoe inspect MODEL`",
    "version": "`emoe --version`, or `emoe info` for a bug report",
    "help": "`emoe --help`",
}
"""Commands of ollama, vLLM and llama.cpp."""

_OPTIONS = {
    ("-m", "--model", "-hf", "-hfr", "--hf-repo"): ("MODEL",),
    ("--prompt", "--text"): ("--prompt", "MODEL"),
    ("-c", "--ctx-size", "--num-ctx", "--n-ctx"): ("--context", "--max-model-len"),
    ("--max-model-len",): ("--context",),
    ("--n-predict", "--max-tokens", "--num-predict"): ("--max-new-tokens",),
    ("-s",): ("--seed",),
    ("-ngl", "--gpu-layers", "--n-gpu-layers"): ("--device",),
    ("-cmoe", "--cpu-moe", "-ncmoe", "--n-cpu-moe", "-ot", "--override-tensor", "--cpu-offload-gb"): (
        "--expert-memory",
    ),
    ("--gpu-memory-utilization",): ("--memory", "--expert-memory"),
    ("--quantization", "--load-in-8bit", "--load-in-4bit"): ("--expert-dtype",),
    ("-tp", "--tensor-parallel-size"): ("--expert-devices", "--device"),
    ("-np", "--parallel"): ("--max-num-seqs", "--batch"),
    ("-b", "--batch-size"): ("--max-num-batched-tokens",),
    ("-a", "--alias"): ("--served-model-name",),
    ("--mlock", "--no-mmap"): ("--reader",),
}
"""Options of the same, and which of emoe's do the same; the first that a command has is named."""

_CONTEXT = next(names for names in _OPTIONS if "--ctx-size" in names)
_OF_LETTERS = {name for names in _OPTIONS for name in names if re.fullmatch(r"-\w{2,}", name)}


def of_command(word: str, known: Iterable[str]) -> str:
    """What to type instead of the command `word`."""
    if word in _COMMANDS:
        return _COMMANDS[word]
    close = difflib.get_close_matches(word, list(known), 1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def foreign(words: Iterable[str], help_text: Callable[[], str]) -> list[str]:
    """Options of other tools, if argparse would take one of them for the command's own: `-ngl 99` for `-n gl`.

    One that stands where an option's value has to is left to argparse, which says that the value is missing.
    """
    words = list(itertools.takewhile(lambda word: word != "--", words))
    given = [word.partition("=")[0] for word in words]
    if _OF_LETTERS.isdisjoint(given):
        return []
    text = help_text()
    own = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))
    valued = set(re.findall(r"(?<![\w-])(--?[a-z][\w-]*) [A-Z{]", text))
    free = [word for before, word in zip(["", *words], given, strict=False) if before not in valued]
    return [word for word in free if word not in own and any(word in names for names in _OPTIONS)]


def of_options(words: Sequence[str], help_text: str) -> str:
    """What to type instead of each option among `words`, in a command that has this help; "" where nothing is known."""
    known = dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_text))
    found: list[str] = []
    for word in (word.partition("=")[0] for word in words if word.startswith("-")):
        same = next((there for here, there in _OPTIONS.items() if word in here), ())
        theirs = next((name for name in same if name in known or (name == "MODEL" and "[MODEL]" in help_text)), None)
        if theirs is None and not same:
            theirs = next(iter(difflib.get_close_matches(word, known, 1, cutoff=0.75)), None)
        if theirs == "MODEL":
            found.append(f"give MODEL without {word}")
        elif theirs is not None:
            found.append(f"for {word} there is {theirs} here" if same else f"did you mean {theirs}?")
        elif word in _CONTEXT:
            found.append(f"nothing is to be set for {word}: the context is the model's")
    if "--prompt TEXT" in help_text and not any(word.startswith("-") for word in words):
        found.append("a prompt goes after -p")
    return "; ".join(dict.fromkeys(found))
