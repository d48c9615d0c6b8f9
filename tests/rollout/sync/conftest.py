"""Trainer ranks of which each holds a part, for the tests of this folder."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from engines import Engines, Trainers

from rollcast.comm import WeightSource


@pytest.fixture
def start_shards() -> Iterator[Callable[..., Trainers]]:
    """Starts trainer ranks, one for each state, which `WeightSource` takes with `dtype`; they are closed at the end."""
    started: list[Trainers] = []

    def start(engines: Engines, states: Sequence[Any], *, dtype: Any = None, **settings: Any) -> Trainers:
        started.append(Trainers([WeightSource(state, dtype=dtype) for state in states], engines, **settings))
        return started[-1]

    yield start
    for each in started:
        each.close()
