"""What README and docs show is run: Python blocks, and the commands of bash blocks."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pytest

from emoe.cli import build_parser, main
from tests.checkpoint.sparse import write_sparse_qwen3_moe

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/user_guide.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("page", "code"), [(page, code) for page in PAGES for code in blocks(page, "python")])
def test_python_blocks_run(
    page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", [line for block in blocks("README.md", "bash") for line in block.splitlines()])
def test_commands_run(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\n"))
    program, *args = shlex.split(line)
    assert program == "emoe"
    try:
        code = main(args)
    except SystemExit as left:  # --help
        assert isinstance(left.code, int)
        code = left.code
    assert code == 0
    assert capsys.readouterr().out


def test_the_plan_in_the_readme_is_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a checkpoint of the same shape, whose files are holes."""
    shown = next(block for block in blocks("README.md", "console") if "emoe plan" in block)
    command, _, expected = shown.partition("\n")
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "nothing-measured"))
    monkeypatch.setenv("EMOE_KERNELS", "torch")  # the same on every processor
    args = shlex.split(command.removeprefix("$ emoe "))
    monkeypatch.chdir(tmp_path)
    folder = Path(args[1])
    folder.mkdir(parents=True)
    write_sparse_qwen3_moe(folder, layers=48, experts=128, hidden=2048, width=768, shards=16)
    capsys.readouterr()
    assert main(args) == 0
    assert capsys.readouterr().out == expected


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs/cli.md").read_text()
    usage = build_parser().format_help()
    commands = re.findall(r"^    (\w+)(?:  | \(|$)", usage, re.MULTILINE)
    assert len(commands) == 13
    for command in commands:
        assert f"`emoe {command}" in text


def test_every_exit_code_is_documented() -> None:
    from emoe import errors

    text = (ROOT / "docs/cli.md").read_text()
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.EmoeError):
            assert f"| {error.exit_code} |" in text


def test_every_json_name_of_a_plan_is_documented() -> None:
    from emoe.planner import plan

    text = (ROOT / "docs/cli.md").read_text()
    missing = [name for name in plan().as_dict() if f"`{name}`" not in text]
    assert not missing
