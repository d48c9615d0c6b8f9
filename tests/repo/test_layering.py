"""Which package may import which: the table of rooms, held statement by statement."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("comm", "rollout", "launch")

# The public part of comm for the packages above it: its face, its small modules and the device helpers.
COMM = frozenset({"comm", "comm.agreement", "comm.deadline", "comm.device", "comm.report", "comm.transport"})
# What every package of rollout may use.
ROLLOUT = COMM | {"rollout.config", "rollout.errors", "rollout.lora"}
# Each room with what it may import besides itself. A room is a package, or a module beside packages.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "comm.deadline": frozenset(),
    "comm.agreement": frozenset({"comm.deadline"}),
    "comm.device": frozenset(),
    "comm.report": frozenset({"comm.device"}),
    "comm.plan": frozenset({"comm.device"}),
    "comm.transport": frozenset({"comm.device", "comm.deadline"}),
    "comm.transfer": frozenset({"comm.plan", "comm.transport", "comm.device", "comm.report", "comm.deadline"}),
    "comm": COMM | {"comm.plan", "comm.transfer"},
    "rollout.errors": frozenset(),
    "rollout.config": COMM | {"rollout.errors"},
    "rollout.lora": COMM | {"rollout.errors"},
    "rollout.protocol": ROLLOUT,
    "rollout.landing": ROLLOUT,
    "rollout.worker": ROLLOUT | {"rollout.landing", "rollout.protocol"},
    "rollout.engine": ROLLOUT | {"rollout.protocol"},
    "rollout.pool": ROLLOUT | {"rollout.protocol"},
    "rollout.sync": ROLLOUT | {"rollout.pool", "rollout.protocol", "rollout.landing.plan"},
    "rollout.orchestrator": ROLLOUT,
    "rollout.job": ROLLOUT | {"rollout.pool", "rollout.sync", "rollout.orchestrator", "rollout.protocol"},
    "rollout": ROLLOUT | {"rollout.job", "rollout.orchestrator", "rollout.pool", "rollout.protocol", "rollout.sync"},
    "launch.signals": COMM | {"rollout"},
    # Programs take from a package its face alone.
    "launch.grpo": COMM | {"rollout", "rollout.job", "rollout.pool", "launch.signals"},
    "launch.serve": COMM | {"rollout", "rollout.pool", "launch.signals"},
    "launch": frozenset(),
}
MAY_IMPORT_VLLM = ("rollout.engine", "rollout.landing", "rollout.worker", "rollout.lora")
# Inside a function stands only what CUDA machines alone or engine processes alone have installed or need.
DEFERRED = ("vllm", "cupy", "pynvml", "rollcast.comm.transport.ipc", "rollcast.comm.transport.nccl")

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


@dataclass(frozen=True, slots=True)
class Import:
    """One name that one statement imports."""

    path: Path
    line: int
    module: str
    """Full name of the module that is imported, or that the name is taken from."""
    name: str
    """The name taken from it; empty where the module itself is imported."""
    deferred: bool
    """Whether the statement stands inside a function."""

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module} {self.name}".rstrip()


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("comm/**/*.py", ("vllm", "rollcast.rollout", "rollcast.launch")),
        ("rollout/__init__.py", ("vllm", "rollcast.launch")),
        ("rollout/landing/__init__.py", ("vllm", "rollcast.rollout.landing.compiler")),
    ],
)
def test_importing_loads_no_upper_layer(modules: str, forbidden: tuple[str, ...], tmp_path: Path) -> None:
    names = [module_name(path) for path in sorted(ROOT.glob(modules))]
    command = [sys.executable, "-P", "-c", PROBE, *names, "--", *forbidden]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_import_is_in_the_table() -> None:
    wrong = [each for each in own_imports() if not is_allowed(each)]
    assert not wrong, "\n".join(map(str, wrong))


def test_vllm_is_imported_where_engines_run_only() -> None:
    wrong = [each for each in all_imports() if is_in(each.module, "vllm") and room(each.path) not in MAY_IMPORT_VLLM]
    assert not wrong, "\n".join(map(str, wrong))


def test_names_of_a_face_are_imported_from_it() -> None:
    """From outside a package, what its `__init__` exports is taken from there."""
    wrong = [
        each
        for each in own_imports()
        if (package := package_of(each.module)) != each.module
        and not is_in(module_name(each.path), package)
        and each.name in face(package)
        and each.module.removeprefix("rollcast.") not in MAY_IMPORT[room(each.path)]
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_no_import_hides_in_a_function() -> None:
    """Programs read their flags before they import what takes seconds: their `__main__` may."""
    wrong = [
        each
        for each in all_imports()
        if each.deferred and each.path.name != "__main__.py" and not any(is_in(each.module, name) for name in DEFERRED)
    ]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("of", ["modules", "rooms"])
def test_there_is_no_circle(of: str) -> None:
    """Between modules, and between rooms: the statements inside functions count, too."""
    graph: dict[str, set[str]] = {}
    for each in own_imports():
        importer, imported = module_name(each.path), each.module
        if of == "rooms":
            importer, imported = room(each.path), room_of(imported)
        if importer != imported:
            graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" <- ".join(circle.args[1]), pytrace=False)


def test_the_table_itself_points_one_way() -> None:
    rooms = {name: {room_of(f"rollcast.{each}") for each in allowed} - {name} for name, allowed in MAY_IMPORT.items()}
    TopologicalSorter(rooms).prepare()


def is_allowed(each: Import) -> bool:
    """Whether the table lets the importing file's room have it."""
    here = room(each.path)
    allowed = MAY_IMPORT[here] | {here}
    # Packages name single modules of others (`rollout.landing.plan`), too.
    return room_of(each.module) in allowed or each.module.removeprefix("rollcast.") in allowed


def room(path: Path) -> str:
    """The room that a file belongs to."""
    return room_of(module_name(path))


def room_of(module: str) -> str:
    """The longest entry of the table that the module is, or is in."""
    parts = module.removeprefix("rollcast.").split(".")
    prefixes = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next(prefix for prefix in prefixes if prefix in MAY_IMPORT)


def is_in(module: str, package: str) -> bool:
    """Whether a module is the package or in it."""
    return f"{module}.".startswith(f"{package}.")


def package_of(module: str) -> str:
    """The package that a module stands in; a package stands in itself."""
    return module if (path_of(module) / "__init__.py").exists() else module.rpartition(".")[0]


@cache
def face(package: str) -> frozenset[str]:
    """What a package exports."""
    tree = ast.parse((path_of(package) / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def path_of(module: str) -> Path:
    """Where a package stands, or a module would, without the suffix."""
    return ROOT / module.removeprefix("rollcast.").replace(".", "/")


def module_name(path: Path) -> str:
    """The name under which a file of the three folders is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["rollcast", *(part for part in parts if part != "__init__")])


def own_imports() -> list[Import]:
    """Every import of one of the three folders."""
    return [each for each in all_imports() if is_in(each.module, "rollcast")]


@cache
def all_imports() -> tuple[Import, ...]:
    """Every import of every file of the three folders."""
    paths = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return tuple(each for path in paths for each in imports(path))


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file."""
    tree = ast.parse(path.read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    deferred = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, alias.name, "", id(node) in deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            for alias in node.names:
                module, name = node.module, alias.name
                if path_of(f"{module}.{name}").with_suffix(".py").exists():
                    module, name = f"{module}.{name}", ""
                yield Import(path, node.lineno, module, name, id(node) in deferred)
