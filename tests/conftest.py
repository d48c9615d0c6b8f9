"""Markers, and the GPUs shared out between processes of pytest-xdist."""

import os

import pytest
import torch
from shares import share_of

if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.device_count():
    # `-n 2` on four GPUs runs two GPU tests at a time.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    gpus = share_of(visible.split(","), worker=worker, workers=int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ends_job: leaves the job that tests share unusable; runs last of its shape")
