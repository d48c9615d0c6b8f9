"""Makes the helpers of test jobs and the benchmarks importable; shares out the GPUs."""

import os
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS / "jobs"), str(TESTS.parent / "benchmarks")]


def share_gpus(worker: int, workers: int) -> None:
    """This process of pytest-xdist sees GPUs of its own: `-n 2` on four GPUs runs two GPU tests at a time."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = visible.split(",")
    size = len(gpus) // workers
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[worker * size : (worker + 1) * size])


if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.device_count():
    share_gpus(int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
