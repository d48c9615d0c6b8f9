"""Markers, and what processes of pytest-xdist share out: tests (`--dist loadgroup`) and GPUs."""

import os
from typing import Any

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
    # pytest-xdist's own, where it is not installed.
    config.addinivalue_line("markers", "xdist_group: tests of one group run in one process")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep tests with a common fixture in one process; those that start engines come first, for they take longest."""
    if hasattr(config, "workerinput"):
        for item in items:
            if item.get_closest_marker("xdist_group") is None and (group := common_fixture(item)):
                item.add_marker(pytest.mark.xdist_group(group))
        items.sort(key=lambda item: item.get_closest_marker("vllm") is None)


def common_fixture(item: Any) -> str:
    """Return where the most widely shared fixture of a test is defined; "" if it shares none of the project's."""
    definitions = [definition for each in item._fixtureinfo.name2fixturedefs.values() for definition in each]
    places = [each.baseid for each in definitions if each.scope != "function" and each.baseid.startswith("tests")]
    return min(places, key=len, default="")
