"""After a sync the engines hold, bit for bit, what a fresh engine loads from the trainer's checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from architectures import build
from torchrun import job_script, run_job

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def fresh_engine(folder: Path, report: Path, *, tensor_parallel_size: int, cpu_weights: str) -> dict[str, Any]:
    environ = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tensor_parallel_size))),
        "ROLLCAST_CPU_WEIGHTS": cpu_weights,
    }
    done = subprocess.run(
        [sys.executable, job_script("fresh.py"), folder, report, str(tensor_parallel_size)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())


def synced_facts(
    name: str,
    tmp_path: Path,
    *,
    trainers: int,
    engines: int,
    tensor_parallel_size: int,
    cpu_weights: str,
    transport: str = "auto",
) -> dict[str, Any]:
    build(name, seed=0).save_pretrained(tmp_path / "initial")
    places = (tmp_path / "initial", tmp_path / "saved", tmp_path / "facts.json")
    arguments = (name, *places, trainers, tensor_parallel_size, cpu_weights, transport)
    ranks = trainers + engines * tensor_parallel_size
    done = run_job(job_script("exact.py"), *map(str, arguments), ranks=ranks, cwd=tmp_path, timeout_s=500)
    assert done.code == 0, done.output
    return json.loads((tmp_path / "facts.json").read_text())


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "trainers", "engines", "tensor_parallel_size", "cpu_weights"),
    [
        ("llama", 1, 1, 1, "plain"),
        ("qwen3-tied", 2, 1, 2, "packed"),
        slow("qwen3-tied", 2, 2, 1, "packed"),
        slow("qwen3_moe", 1, 1, 1, "packed"),
        slow("gpt2", 1, 1, 1, "packed"),
        slow("gemma3", 1, 1, 1, "plain"),
        slow("phi3-fused", 1, 1, 1, "packed"),
        slow("qwen3_moe", 2, 1, 2, "plain"),
        slow("gpt2", 1, 1, 2, "plain"),
    ],
)
def test_a_synced_engine_equals_a_fresh_one(
    tmp_path: Path, name: str, trainers: int, engines: int, tensor_parallel_size: int, cpu_weights: str
) -> None:
    shape: Any = {"tensor_parallel_size": tensor_parallel_size, "cpu_weights": cpu_weights}
    facts = synced_facts(name, tmp_path, trainers=trainers, engines=engines, **shape)
    after = fresh_engine(tmp_path / "saved", tmp_path / "after.json", **shape)
    check_equal(facts, after, engines=engines)
    if name in ("llama", "qwen3-tied"):
        assert facts["tokens"] == facts["expected"], "transformers' greedy tokens"


def check_equal(facts: dict[str, Any], after: dict[str, Any], *, engines: int) -> None:
    for old, new in zip(facts["before"][0], after["workers"], strict=True):
        assert sum(new[name] != old[name] for name in new) >= 15, "the perturbation must reach the engine's weights"
    assert len(facts["fingerprints"]) == engines
    for workers in facts["fingerprints"]:
        assert workers == after["workers"]
    assert facts["tokens"] == after["tokens"]
    assert facts["versions"] == [[2]] * len(facts["versions"])
    assert facts["describe"] == [[2, None]] * engines
    assert len(facts["sync"]["workers"]) == engines * len(after["workers"])
