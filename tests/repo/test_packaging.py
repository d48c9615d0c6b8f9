"""The wheel holds the three folders under ``rollcast`` and leaves Jupyter's ``comm`` package alone."""

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("comm", "rollout", "launch")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy: a stale build/ of the checkout must not get into it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, source)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture
def site_packages(tmp_path: Path) -> Path:
    """Site-packages of a fresh environment that has Jupyter's ``comm`` and nothing else."""
    env = tmp_path / "env"
    venv.create(env, with_pip=False)
    try:
        pip("--python", env / "bin/python", "install", "--no-deps", "comm==0.2.3")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"pip cannot get Jupyter's comm: {error.stderr.strip().splitlines()[-1]}")
    (folder,) = env.glob("lib/python*/site-packages")
    return folder


def test_the_wheel_holds_the_three_folders_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"rollcast/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_installing_and_removing_leaves_jupyters_comm_untouched(wheel: Path, site_packages: Path) -> None:
    python = site_packages.parents[2] / "bin/python"
    jupyter = contents(site_packages / "comm")

    pip("--python", python, "install", "--no-deps", wheel)
    assert contents(site_packages / "comm") == jupyter
    assert origin(python, "comm") == site_packages / "comm/__init__.py"
    assert origin(python, "rollcast.comm") == site_packages / "rollcast/comm/__init__.py"

    pip("--python", python, "uninstall", "--yes", "rollcast")
    assert contents(site_packages / "comm") == jupyter
    assert origin(python, "comm") == site_packages / "comm/__init__.py"
    assert not contents(site_packages / "rollcast")


def pip(*arguments: str | Path) -> None:
    """Run this environment's pip."""
    command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a package, without the bytecode that an import writes."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def origin(python: Path, module: str) -> Path:
    """The file that ``import module`` would run, found without running it."""
    code = f"import importlib.util; print(importlib.util.find_spec({module!r}).origin)"
    done = subprocess.run([python, "-P", "-c", code], check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())
