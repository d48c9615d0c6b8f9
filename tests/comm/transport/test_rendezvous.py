"""Joining a group: unknown transports are refused, and peers that do not come are not waited for."""

import time

import pytest
from torch import distributed as dist

from rollcast.comm import Deadline, host_store, join_group


def test_peers_that_do_not_come_are_not_waited_for() -> None:
    store, _ = host_store("127.0.0.1", timeout_s=30.0)
    start = time.monotonic()
    with pytest.raises((TimeoutError, dist.DistStoreError)):
        join_group("gloo", store, rank=0, size=2, deadline=Deadline(0.3))
    assert time.monotonic() - start < 3.0


def test_unknown_transport_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown transport 'mpi', expected one of gloo, nccl"):
        join_group("mpi", dist.HashStore(), rank=0, size=1, deadline=Deadline(1))
