"""The GPUs' states before and after a sync: asked for with a deadline."""

import time
from typing import Any

import pytest
import torch

from rollcast.comm import Deadline
from rollcast.rollout import EngineError
from rollcast.rollout.errors import Failure
from rollcast.rollout.sync.broadcaster import GpuWatch


class SilentPool:
    """Engines that never answer."""

    def call_workers(self, method: str, *, deadline: Deadline) -> None:
        time.sleep(deadline.left_s())
        raise EngineError(failures=[Failure(text="no answer", engine=0)])


def test_silent_workers_are_not_waited_for_without_an_end() -> None:
    pool: Any = SilentPool()
    start = time.monotonic()
    watch = GpuWatch(pool, torch.device("cuda"), timeout_s=0.2)
    with pytest.raises(EngineError, match="engine 0: no answer"), watch.during():
        raise AssertionError("nothing is watched without a first state")
    assert 0.1 < time.monotonic() - start < 2.0


def test_on_a_cpu_nobody_is_asked() -> None:
    pool: Any = SilentPool()
    with GpuWatch(pool, torch.device("cpu"), timeout_s=60.0).during() as watch:
        pass
    assert watch.reports == ()
