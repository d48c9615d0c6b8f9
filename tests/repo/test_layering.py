"""Imports point one way: launch -> rollout -> comm, and comm knows no vLLM."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"comm": ("vllm", "rollcast.rollout", "rollcast.launch"), "rollout": ("rollcast.launch",)}

# Import the modules named first one by one; name the first that brings in one of those after "--".
PROBE = """
import importlib, sys
split = sys.argv.index("--")
for name in sys.argv[1:split]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("cupy", "pynvml"):
            raise
    for forbidden in sys.argv[split + 1:]:
        if forbidden in sys.modules:
            sys.exit(f"importing {name} loads {forbidden}")
"""


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [("comm/**/*.py", FORBIDDEN["comm"]), ("rollout/__init__.py", ("vllm", *FORBIDDEN["rollout"]))],
)
def test_importing_loads_no_upper_layer(modules: str, forbidden: tuple[str, ...], tmp_path: Path) -> None:
    names = [module_name(path) for path in sorted(ROOT.glob(modules))]
    command = [sys.executable, "-P", "-c", PROBE, *names, "--", *forbidden]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_import_statement_names_an_upper_layer(folder: str) -> None:
    """The statements inside functions too, which importing the module does not run."""
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imports(path)
        if any(f"{name}.".startswith(f"{package}.") for package in FORBIDDEN[folder])
    ]
    assert not upward, "\n".join(upward)


def module_name(path: Path) -> str:
    """The name under which a file of the three folders is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["rollcast", *(part for part in parts if part != "__init__")])


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
