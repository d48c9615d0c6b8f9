"""Broadcasts over gloo end: at their deadline, and when this process leaves the group."""

import subprocess
import sys
import time

import pytest
import torch
from torch import distributed as dist

from rollcast.comm import Deadline, join_group

LONG_S = 30.0

LEAVE = """
import torch
from concurrent.futures import ThreadPoolExecutor
from rollcast.comm import Deadline, host_store, join_group

store, address = host_store("127.0.0.1", timeout_s=30)
with ThreadPoolExecutor(2) as threads:
    joining = [
        threads.submit(join_group, "gloo", where, rank=rank, size=2, deadline=Deadline(30))
        for rank, where in enumerate((store, address))
    ]
group, peer = [future.result() for future in joining]
work = group.broadcast([torch.zeros(1 << 20, dtype=torch.uint8)], root=0, deadline=Deadline(5))
group.close()
try:
    work.wait(Deadline(30))
except RuntimeError as error:
    print(error)
"""


def test_a_broadcast_with_a_spent_deadline_names_itself() -> None:
    deadline = Deadline(0.01)
    time.sleep(0.02)
    group = join_group("gloo", dist.HashStore(), rank=0, size=1, deadline=Deadline(LONG_S))
    with pytest.raises(TimeoutError, match="a gloo broadcast"):
        group.broadcast([torch.zeros(1, dtype=torch.uint8)], root=0, deadline=deadline)


def test_leaving_ends_a_broadcast_under_way_and_the_process_can_end() -> None:
    """`PoolBroadcaster` relies on this when an engine fails and its workers are still in the group."""
    run = subprocess.run([sys.executable, "-P", "-c", LEAVE], capture_output=True, text=True, timeout=LONG_S)
    assert "closed while a gloo broadcast was under way" in run.stdout
    assert run.returncode == 0, run.stderr
