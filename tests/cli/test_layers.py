"""Options from flags, the environment and a file: the nearest wins, and what nobody knows is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emoe.cli.layers import Layers
from emoe.cli.options import positive, size
from emoe.errors import UsageError


def layered() -> tuple[argparse.ArgumentParser, Layers]:
    parser = argparse.ArgumentParser(prog="emoe serve")
    layers = Layers(parser)
    group = layers.group("some")
    group.add_argument("model", nargs="?", metavar="MODEL")
    group.add_argument("--max-num-seqs", "--max-running", type=positive, default=32)
    group.add_argument("--kv-memory", type=size)
    group.add_argument("--scheduler", choices=("fifo", "edf"), default="edf")
    group.add_argument("--origin", action="append")
    group.add_argument("--quick", action="store_true")
    group.add_argument("--factor", type=float, default=0.5)
    return parser, layers


def resolve(flags: list[str], environ: dict[str, str], file: Path | None = None) -> dict[str, Any]:
    parser, layers = layered()
    argv = flags + ([] if file is None else ["--config", str(file)])
    found = vars(layers.resolve(parser.parse_args(argv), {"PATH": "/bin", **environ}))
    found.pop("config")
    return found


def test_what_emoe_reads_whatever_runs_is_no_option_of_a_command() -> None:
    assert resolve([], {"EMOE_KERNELS": "torch", "EMOE_CACHE": "there"}) == resolve([], {})


def test_defaults() -> None:
    assert resolve([], {}) == {
        "model": None,
        "max_num_seqs": 32,
        "kv_memory": None,
        "scheduler": "edf",
        "origin": None,
        "quick": False,
        "factor": 0.5,
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.tuples(*[st.none() | st.integers(1, 99)] * 3), st.sampled_from(["max-num-seqs", "max_num_seqs", "max-running"])
)
def test_flag_before_environment_before_file_before_default(
    tmp_path: Path, given: tuple[int | None, ...], name: str
) -> None:
    flag, variable, written = given
    file = tmp_path / "serve.toml"
    file.write_text("" if written is None else f"{name} = {written}")
    environ = {} if variable is None else {"EMOE_MAX_NUM_SEQS": str(variable)}
    found = resolve([] if flag is None else [f"--max-num-seqs={flag}"], environ, file)
    assert found["max_num_seqs"] == next((each for each in given if each is not None), 32)


def test_every_kind_of_option_from_each_source(tmp_path: Path) -> None:
    wanted = {
        "model": "m",
        "max_num_seqs": 4,
        "kv_memory": 1 << 20,
        "scheduler": "fifo",
        "origin": ["a", "b"],
        "quick": True,
        "factor": 2.0,
    }
    flags = ["m", "--max-running", "4", "--kv-memory", "1MiB", "--scheduler", "fifo", "--origin", "a", "--origin", "b"]
    assert resolve([*flags, "--quick", "--factor", "2"], {}) == wanted
    environ = {"MODEL": "m", "MAX_RUNNING": "4", "KV_MEMORY": "1MiB", "SCHEDULER": "fifo", "ORIGIN": "a,b"}
    environ |= {"QUICK": "yes", "FACTOR": "2"}
    assert resolve([], {f"EMOE_{name}": value for name, value in environ.items()}) == wanted
    file = tmp_path / "serve.toml"
    file.write_text(
        'model = "m"\nmax-running = 4\nkv_memory = 1048576\nscheduler = "fifo"\norigin = ["a", "b"]\nquick = true\n'
        "factor = 2"
    )
    assert resolve([], {}, file) == wanted
    assert resolve([], {"EMOE_CONFIG": str(file)}) == wanted
    # A flag that can be repeated replaces what the others say, and does not add to it.
    assert resolve(["--origin", "c"], {}, file)["origin"] == ["c"]
    assert resolve([], {"EMOE_QUICK": "off"}, file)["quick"] is False


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"EMOE_FROBNICATE": "1"}, "EMOE_FROBNICATE is no option of emoe serve; --help lists all"),
        ({"EMOE_MAX_NUM_SEQ": "1"}, "did you mean max-num-seqs?"),
        ({"EMOE_MAX_NUM_SEQS": "0"}, "EMOE_MAX_NUM_SEQS: must be a whole number of at least 1, not '0'"),
        ({"EMOE_MAX_NUM_SEQS": ""}, "EMOE_MAX_NUM_SEQS: must be"),
        ({"EMOE_KV_MEMORY": "8G"}, "EMOE_KV_MEMORY: .*8GiB"),
        ({"EMOE_SCHEDULER": "lifo"}, "EMOE_SCHEDULER: 'lifo' is none of fifo, edf"),
        ({"EMOE_QUICK": "maybe"}, "EMOE_QUICK must be true or false, not 'maybe'"),
        ({"EMOE_FACTOR": "x"}, "EMOE_FACTOR: 'x' is not what --factor takes"),
        ({"EMOE_MAX_NUM_SEQS": "1", "EMOE_MAX_RUNNING": "2"}, "the environment has two values for --max-running"),
        ({"EMOE_CONFIG": "/nothing.toml"}, "cannot read --config /nothing.toml"),
    ],
)
def test_the_environment_is_checked(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve([], environ)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frobnicate = 1", "frobnicate is no option of emoe serve"),
        ("[server]\nport = 3", "server is no option"),
        ("max-num-seqs = true", "max-num-seqs must be text or a number, not True"),
        ("max-num-seqs = 1.5", "must be a whole number"),
        ("quick = 1.5", "quick must be true or false"),
        ("max-num-seqs = 1\nmax_num_seqs = 2", "two values"),
        ("max-num-seqs =", "is not valid TOML"),
        ("origin = [[1]]", "must be text or a number"),
    ],
)
def test_the_file_is_checked(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as refused:
        resolve([], {}, file)
    assert str(file) in str(refused.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot read --config"):
        resolve([], {}, file)
