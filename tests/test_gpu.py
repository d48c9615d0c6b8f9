"""The same jobs on two GPUs: NCCL instead of gloo, CUDA graphs, bfloat16."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exact import check_equal, fresh_engine, synced_facts
from torchrun import run_job

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.gpus2,
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


def run_grpo(tmp_path: Path, *flags: str) -> dict[str, Any]:
    done = run_job("-m", "rollcast.launch.grpo", *flags, ranks=2, cwd=tmp_path, timeout_s=300)
    assert done.code == 0, done.output
    (report,) = tmp_path.glob("runs/*/report.json")
    return json.loads(report.read_text())


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_a_synced_engine_equals_a_fresh_one_on_gpus(tmp_path: Path, transport: str) -> None:
    shape: Any = {"tensor_parallel_size": 1, "cpu_weights": "plain"}
    facts = synced_facts("llama", tmp_path, trainers=1, engines=1, transport=transport, **shape)
    after = fresh_engine(tmp_path / "saved", tmp_path / "after.json", **shape)
    check_equal(facts, after, engines=1)


def test_the_main_job_learns_on_gpus(tmp_path: Path) -> None:
    report = run_grpo(tmp_path)
    rewards = [step["reward"] for step in report["steps"]]
    assert sum(rewards[-5:]) / 5 > 0.9
    assert max(step["logprob_max_diff"] for step in report["steps"]) < 1e-3


def test_bfloat16_with_cuda_graphs(tmp_path: Path) -> None:
    report = run_grpo(tmp_path, "--dtype", "bfloat16", "--steps", "4", "--logprob-tolerance", "0.1")
    assert [step["policy_version"] for step in report["steps"]] == [1, 2, 3, 4]
