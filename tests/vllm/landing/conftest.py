"""Processes with vLLM for the tests of this folder, one for each layout of weights on CPU."""

from collections.abc import Iterator

import pytest
from landing_process import LandingProcess


@pytest.fixture(scope="session")
def landing_processes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, LandingProcess]]:
    """The processes by layout, "plain" and "packed"."""
    processes = {layout: LandingProcess(layout, tmp_path_factory.mktemp(layout)) for layout in ("plain", "packed")}
    if len(request.session.items) > 1:
        # Both will be needed: they import vLLM at the same time, on a core each.
        for process in processes.values():
            process.start()
    yield processes
    for process in processes.values():
        process.close()


@pytest.fixture
def plain(landing_processes: dict[str, LandingProcess]) -> LandingProcess:
    """vLLM keeps linear weights as they are loaded, as it does on CUDA."""
    return landing_processes["plain"]


@pytest.fixture
def packed(landing_processes: dict[str, LandingProcess]) -> LandingProcess:
    """vLLM packs linear weights after loading, its default on CPU."""
    return landing_processes["packed"]
