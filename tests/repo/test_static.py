"""The source itself: linter, formatter, type checker, and the sizes of files and functions."""

import ast
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("comm", "rollout", "launch", "benchmarks", "tests")
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "pyright"])
def test_tool_is_content(command: str) -> None:
    name, *arguments = command.split()
    tool = shutil.which(name, path=sysconfig.get_path("scripts"))
    if tool is None:
        pytest.skip(f"{name} is not installed beside this Python")
    run = subprocess.run([tool, *arguments], cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.fail(f"{command}:\n{run.stdout}{run.stderr}", pytrace=False)


def test_files_and_functions_stay_small() -> None:
    too_long = [line for path in sources() for line in oversized(path)]
    assert not too_long, "\n".join(["too long:", *too_long])


def sources() -> list[Path]:
    """Every Python file of the project."""
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def oversized(path: Path) -> Iterator[str]:
    """One line for the file and for each of its functions that is over its limit."""
    text, name = path.read_text(), path.relative_to(ROOT)
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        yield f"{name} has {lines} lines, the limit is {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield f"{name}:{node.lineno} {node.name} has {lines} lines, the limit is {MAX_FUNCTION_LINES}"
