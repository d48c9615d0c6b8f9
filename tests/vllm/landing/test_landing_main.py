"""`python -m rollcast.rollout.landing` prints where a model's weights land, as tables or as JSON.

One test runs the command as a user does; the others call it in a process that has imported vLLM.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from architectures import CONVERTED, IMAGES, build
from landing_process import LandingProcess

from rollcast.rollout.landing.__main__ import main, size_text
from rollcast.rollout.landing.offline import checkpoint_manifest

QUICK = ("mixtral", "qwen3_vl")

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def run(process: LandingProcess, *arguments: object) -> dict[str, Any]:
    """Exit code, "out" and "err" of the command."""
    return process.run("command", arguments=[str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    build("qwen3_moe", seed=0).save_pretrained(folder)
    return folder


def test_two_workers_get_their_experts(folder: Path, plain: LandingProcess) -> None:
    flags = ("--tensor-parallel-size", 2, "--enable-expert-parallel", "--cpu-weights", "plain")
    done = run(plain, "--model", folder, *flags, "--json")
    assert done["code"] == 0, done["err"]
    plan = json.loads(done["out"].splitlines()[-1])
    assert plan["problems"] == []
    assert plan["workers"] == len(plan["lanes"]) == 2
    assert all(unused > 0 for unused in plan["unused"])
    # Norms and routers are on both, embeddings are padded alike; experts and projections are not sent twice.
    assert plan["checkpoint_bytes"] <= plan["total_bytes"] < 1.1 * plan["checkpoint_bytes"]
    assert plan["total_bytes"] == sum(lane["bytes_per_worker"] for lane in plan["lanes"])
    assert 0 < plan["zero_copy_bytes"] == plan["total_bytes"] - plan["staged_bytes"]
    assert all("expert" not in row["why"] or row["kind"] == "staged" for row in plan["staged"])


def test_a_configuration_is_enough_and_tables_are_for_people(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    # As a configuration saves itself: only models know their architecture.
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ROLLCAST")}
    command = [sys.executable, "-m", "rollcast.rollout.landing", "--model", tmp_path]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for text in ("Landing plan", "zero-copy", "Not received in place", "Lanes", "no problems"):
        assert text in done.stdout
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "qwen3_vl",
        *(pytest.param(name, marks=pytest.mark.slow) for name in (*CONVERTED, *IMAGES) if name not in QUICK),
    ],
)
def test_a_configuration_tells_what_the_checkpoint_has(plain: LandingProcess, tmp_path: Path, name: str) -> None:
    build(name, seed=0).config.save_pretrained(tmp_path)
    plan = json.loads(run(plain, "--model", tmp_path, "--json")["out"].splitlines()[-1])
    assert plan["problems"] == [] and plan["moves"] > 0


def test_problems_are_listed_by_name(folder: Path, tmp_path: Path, packed: LandingProcess) -> None:
    config = json.loads((folder / "config.json").read_text())
    for file in folder.glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    done = run(packed, "--model", tmp_path, "--json")
    plan = json.loads(done["out"].splitlines()[-1])
    assert done["code"] == 1
    assert any(problem.startswith("model.layers.2.") for problem in plan["problems"])


@pytest.mark.parametrize(
    ("workers", "max_bytes", "message"),
    [(3, None, "must be divisible by tensor parallel size (3)"), (2, 5000, "model.safetensors cannot be read")],
)
def test_what_cannot_be_planned_is_an_error_without_traceback(
    folder: Path, tmp_path: Path, packed: LandingProcess, workers: int, max_bytes: int | None, message: str
) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:max_bytes])
    done = run(packed, "--model", tmp_path, "--tensor-parallel-size", workers)
    assert done["code"] == 2
    assert message in done["err"] and "Traceback" not in done["err"]


def test_only_the_files_of_the_index_count(tmp_path: Path) -> None:
    build("llama", seed=0).save_pretrained(tmp_path, max_shard_size="100kB")
    expected = checkpoint_manifest(tmp_path)
    (part, *_) = tmp_path.glob("model-*.safetensors")
    (tmp_path / "consolidated.safetensors").write_bytes(part.read_bytes())
    assert checkpoint_manifest(tmp_path) == expected
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="is listed twice"):
        checkpoint_manifest(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "/nowhere"), "config.json"),
        (("--model", "/nowhere", "--tensor-parallel-size", "0"), "must be positive"),
        ((), "--model"),
    ],
)
def test_bad_flags_are_named(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    # The command sets variables for vLLM, which is not imported here.
    with mock.patch.dict(os.environ):
        try:
            code: Any = main(list(flags))
        except SystemExit as ended:
            code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (16_380_000_000, "16.38 GB")]
)
def test_sizes_are_decimal(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text
