"""After a sync the engines hold, bit for bit, what a fresh engine loads from the trainer's checkpoint."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from architectures import build
from exact import Synced, SyncJob, sync_twice_shared
from fresh import Fresh
from jobs import SharedJob
from shapes import SHAPES
from torchrun import SEARCH_PATH, job_script, run_job

from rollcast.rollout.job.world import without_torchrun

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def fresh_engine(folder: Path, report: Path, *, tensor_parallel_size: int, cpu_weights: str) -> Fresh:
    environ = without_torchrun(os.environ) | {
        "PYTHONPATH": SEARCH_PATH,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tensor_parallel_size))),
        "ROLLCAST_CPU_WEIGHTS": cpu_weights,
        # Fewer processes to start.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    done = subprocess.run(
        [sys.executable, job_script("fresh.py"), folder, report, str(tensor_parallel_size)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return msgspec.json.decode(report.read_bytes(), type=Fresh)


def run_synced(
    name: str,
    tmp_path: Path,
    *,
    trainers: int,
    engines: int,
    tensor_parallel_size: int,
    cpu_weights: str,
    transport: str = "auto",
) -> Synced:
    """Two syncs in a job of its own."""
    build(name, seed=0).save_pretrained(tmp_path / "initial")
    what = SyncJob(
        architecture=name,
        initial=str(tmp_path / "initial"),
        saved=str(tmp_path / "saved"),
        report=str(tmp_path / "facts.json"),
        trainers=trainers,
        tensor_parallel_size=tensor_parallel_size,
        cpu_weights=cpu_weights,
        transport=transport,
    )
    argument, ranks = msgspec.json.encode(what).decode(), trainers + engines * tensor_parallel_size
    done = run_job(job_script("exact.py"), argument, ranks=ranks, cwd=tmp_path, timeout_s=500)
    assert done.code == 0, done.output
    return msgspec.json.decode((tmp_path / "facts.json").read_bytes(), type=Synced)


@pytest.mark.parametrize("shared_job", ["one_engine", "two_trainers"], indirect=True)
def test_a_synced_engine_of_a_shared_job_equals_a_fresh_one(
    shared_job: SharedJob, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """One trainer, one worker, plain weights; two FSDP2 trainers, two workers, tied embeddings, packed weights."""
    shape = SHAPES[request.node.callspec.params["shared_job"]]
    synced, *_ = shared_job.on_trainers(sync_twice_shared, shape.model, tmp_path / "saved")
    fresh = fresh_engine(
        tmp_path / "saved",
        tmp_path / "fresh.json",
        tensor_parallel_size=shape.tensor_parallel_size,
        cpu_weights=shared_job.trainer.job.config.cpu_weights,
    )
    check_equal(synced, fresh, engines=1)
    assert synced.tokens == synced.expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trainers", "engines", "tensor_parallel_size", "cpu_weights"),
    [
        ("qwen3-tied", 2, 2, 1, "packed"),
        ("qwen3_moe", 1, 1, 1, "packed"),
        ("gpt2", 1, 1, 1, "packed"),
        ("gemma3", 1, 1, 1, "plain"),
        ("phi3-fused", 1, 1, 1, "packed"),
        ("qwen3_moe", 2, 1, 2, "plain"),
        ("gpt2", 1, 1, 2, "plain"),
    ],
)
def test_a_synced_engine_equals_a_fresh_one(
    tmp_path: Path, name: str, trainers: int, engines: int, tensor_parallel_size: int, cpu_weights: str
) -> None:
    shape: Any = {"tensor_parallel_size": tensor_parallel_size, "cpu_weights": cpu_weights}
    synced = run_synced(name, tmp_path, trainers=trainers, engines=engines, **shape)
    check_equal(synced, fresh_engine(tmp_path / "saved", tmp_path / "fresh.json", **shape), engines=engines)
    if name == "qwen3-tied":
        assert synced.tokens == synced.expected, "transformers' greedy tokens"


def check_equal(synced: Synced, fresh: Fresh, *, engines: int) -> None:
    for old, new in zip(synced.before[0], fresh.workers, strict=True):
        assert sum(new[name] != old[name] for name in new) >= 15, "the perturbation must reach the engine's weights"
    assert len(synced.fingerprints) == engines
    for workers in synced.fingerprints:
        assert workers == fresh.workers
    assert synced.tokens == fresh.tokens
    assert synced.token_versions == [[synced.version]] * len(synced.tokens)
    assert synced.states == [(synced.version, None)] * engines
    assert synced.workers == engines * len(fresh.workers)
