"""Pinning measured processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from emoe.bench import cores
from emoe.bench.client import WorkerClient
from emoe.bench.cores import cores_for, parse_cores, pinned, usable_cores
from emoe.errors import UsageError

LINUX = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins nothing")


@LINUX
def test_a_worker_and_its_threads_are_on_the_given_cores_and_this_process_is_not(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    one = usable_cores()[-1:]
    answer = "import json, os, sys, threading; sys.stdin.readline(); found = []; "
    answer += "t = threading.Thread(target=lambda: found.extend(os.sched_getaffinity(0))); t.start(); t.join(); "
    answer += "print(json.dumps({'cores': found}), flush=True)"
    with WorkerClient("asked", command=(sys.executable, "-c", answer), cores=one) as client:
        assert client.ask("where") == {"cores": list(one)}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(RuntimeError), pinned(one):
        raise RuntimeError
    assert os.sched_getaffinity(0) == before


def test_as_many_cores_as_threads() -> None:
    assert cores_for(2, (4, 6, 7)) == (4, 6)
    assert cores_for(5, (4, 6)) == (4, 6)
    assert cores_for(1, None) is None


@LINUX
def test_cores_are_chosen_by_name() -> None:
    assert parse_cores("none") is None
    assert set(parse_cores("auto") or ()) == set(usable_cores())
    last = usable_cores()[-1]
    assert parse_cores(f"{last},{last}") == (last,)
    for wrong in ("", "0-1", "99999"):
        with pytest.raises(UsageError, match="cores are auto, none or"):
            parse_cores(wrong)


@LINUX
def test_the_second_hardware_thread_of_a_core_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for core, siblings in {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}.items():
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    monkeypatch.setattr(cores, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(cores, "usable_cores", lambda: (0, 1, 2, 3, 9))
    assert parse_cores("auto") == (0, 2, 9, 1, 3)
