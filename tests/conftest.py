"""Markers, and what processes of pytest-xdist share out: tests (`--dist loadgroup`) and GPUs."""

import os

import pytest
import torch
from shares import share_of

# Of groups of tests; without one in between.
ORDER = ("landings", "", "jobs")

if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.device_count():
    # `-n 2` on four GPUs runs two GPU tests at a time.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    gpus = share_of(visible.split(","), worker=worker, workers=int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ends_job: leaves the job that tests share unusable; runs last of its shape")
    # pytest-xdist's own, where it is not installed.
    config.addinivalue_line("markers", "xdist_group: tests of one group run in one process")


# First: tests/vllm/conftest.py has an order of its own for the tests that share jobs.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that start jobs in one process, one at a time and last; tests on shared models, in one and first."""
    for item in items:
        if group := group_of(item):
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: ORDER.index(group_of(item)))


def group_of(item: pytest.Item) -> str:
    """Return the tests that a test has to run with; empty if it is free."""
    folders = {*item.path.parts}
    if {"vllm", "landing"} <= folders:
        return "landings"
    return "jobs" if {"vllm", "gpu"} & folders else ""
