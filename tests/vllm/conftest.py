"""Jobs that tests share, one fixture for each shape; tests run in the shapes' order, so that each starts once."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jobs import Jobs, SharedJob
from shapes import SHAPES

ORDER = {name: place for place, name in enumerate(SHAPES, start=1)}


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path_factory)
    yield jobs
    jobs.close()


def fixture_of(name: str) -> Callable[..., Any]:
    """A fixture: the job of a shape, with initial weights. A test that fails, or is marked so, ends it."""

    @pytest.fixture(name=name)
    def open_job(jobs: Jobs, request: pytest.FixtureRequest) -> Iterator[SharedJob]:
        yield from open_shared(jobs, name, request)

    return open_job


@pytest.fixture
def shared_job(jobs: Jobs, request: pytest.FixtureRequest) -> Iterator[SharedJob]:
    """The job of the shape that the test's parameter names."""
    yield from open_shared(jobs, request.param, request)


def open_shared(jobs: Jobs, name: str, request: pytest.FixtureRequest) -> Iterator[SharedJob]:
    yield jobs.open(name)
    if request.node.get_closest_marker("ends_job") or request.node.stash.get(FAILED, False):
        jobs.abandon()


FAILED = pytest.StashKey[bool]()
one_engine = fixture_of("one_engine")
two_engines = fixture_of("two_engines")
two_trainers = fixture_of("two_trainers")
lora = fixture_of("lora")
lora_two_versions = fixture_of("lora_two_versions")
lora_two_workers = fixture_of("lora_two_workers")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: Any = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests without a shared job first; of those that share one, those that end it last."""
    items.sort(key=lambda item: (shape_of(item), item.get_closest_marker("ends_job") is not None))


def shape_of(item: Any) -> int:
    """Place of the shape that a test shares a job of; 0 without one."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    names = [*getattr(item, "fixturenames", ()), parameters.get("shared_job")]
    return max((ORDER[name] for name in names if name in ORDER), default=0)
