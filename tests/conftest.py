"""Markers, and what processes of pytest-xdist share out: tests (`--dist loadscope`) and GPUs."""

import os
from typing import Any

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


# First: tests/vllm/conftest.py has an order of its own for the tests that share jobs.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests on shared models first, and tests that start jobs last."""
    items.sort(key=lambda item: ORDER.index(group_of(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each group to one process, as a whole. (Groups by marks need node ids that can be changed.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid) or nodeid

    return Groups(config, log)


def group_of(nodeid: str) -> str:
    """Return the tests that a test has to run with, in one process; empty if it is free."""
    if nodeid.startswith("tests/vllm/landing/"):
        return "landings"
    return "jobs" if nodeid.startswith(("tests/vllm/", "tests/gpu/")) else ""
