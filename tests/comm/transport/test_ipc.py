"""The protocol of the CUDA IPC transport, on host memory: threads, real sockets, a stand-in for the CUDA runtime."""

import contextlib
import ctypes
import importlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rollcast.comm import Deadline, host_store, join_group
from rollcast.comm.transport import PersistentTensors

CPU = torch.device("cpu")
PAGE = 1 << 12
MODULES = ("rollcast.comm.transport.ipc", "rollcast.comm.transport.ipc_memory")


class Runtime:
    """A stand-in for the CUDA runtime. A handle is the address; allocations are pages, all with the number `number`."""

    def __init__(self) -> None:
        self.mapped: list[int] = []
        self.number = 0
        self.lookups = 0

    def allocation(self, address: int) -> Any:
        # Can be imported only after this stand-in is in place.
        from rollcast.comm.transport.ipc_memory import Allocation

        self.lookups += 1
        return Allocation(address // PAGE * PAGE, 1 << 20, self.number, exportable=True)

    def ipcGetMemHandle(self, address: int) -> bytes:
        return address.to_bytes(64, "big")

    def ipcOpenMemHandle(self, handle: bytes) -> int:
        self.mapped.append(int.from_bytes(handle, "big"))
        return self.mapped[-1]

    def ipcCloseMemHandle(self, address: int) -> None:
        self.mapped.remove(address)

    def memcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        ctypes.memmove(target, source, nbytes)


class Stream:
    cuda_stream = 0

    def wait_stream(self, other: object) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    fake = Runtime()
    packages: dict[str, Any] = {"cupy": ModuleType("cupy"), "cupy.cuda": ModuleType("cupy.cuda")}
    packages["cupy.cuda"].runtime = fake
    for name, module in packages.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    ipc = importlib.import_module("rollcast.comm.transport.ipc")
    memory = sys.modules["rollcast.comm.transport.ipc_memory"]
    monkeypatch.setattr(memory, "allocation", fake.allocation)
    monkeypatch.setattr(memory, "allocation_number", lambda address: fake.number)
    monkeypatch.setattr(ipc, "gpu_uuid", lambda device: f"GPU-{device}")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    event = SimpleNamespace(record=lambda stream: None, query=lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    yield fake
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)


class Ranks:
    """A sender and its receivers, each with a thread for blocking calls."""

    def __init__(self, receivers: int) -> None:
        self.store, address = host_store("127.0.0.1", timeout_s=20)
        self.threads = ThreadPoolExecutor(receivers + 1)
        joining = [
            self.threads.submit(
                join_group,
                "ipc",
                address if rank else self.store,
                rank=rank,
                size=receivers + 1,
                deadline=Deadline(20),
                device=CPU,
                label=f"rank {rank}",
            )
            for rank in range(receivers + 1)
        ]
        self.sender, *self.receivers = [future.result(20) for future in joining]

    def broadcast(self, source: torch.Tensor) -> list[torch.Tensor]:
        targets = [torch.zeros_like(source) for _ in self.receivers]
        reading = [
            self.threads.submit(lambda group=group, target=target: take_part(group, [target]))
            for group, target in zip(self.receivers, targets, strict=True)
        ]
        take_part(self.sender, [source])
        for future in reading:
            future.result(10)
        return targets


def take_part(group: Any, tensors: list[torch.Tensor]) -> None:
    group.broadcast(tensors, root=0, deadline=Deadline(10)).wait(Deadline(10))


def test_every_receiver_reads_the_senders_bytes(runtime: Runtime) -> None:
    ranks = Ranks(2)
    for turn in range(5):
        source = torch.arange(1000, dtype=torch.uint8) + turn
        assert all(torch.equal(target, source) for target in ranks.broadcast(source))
    ranks.sender.close()
    for group in ranks.receivers:
        group.close()
        group.close()
    assert runtime.mapped == []


def test_memory_that_was_freed_is_not_kept_mapped(runtime: Runtime) -> None:
    ranks = Ranks(1)
    source = torch.arange(100, dtype=torch.uint8)
    ranks.broadcast(source)
    ranks.broadcast(source)
    assert len(runtime.mapped) == 1
    runtime.number += 1
    ranks.broadcast(source)
    assert len(runtime.mapped) == 1


def test_persistent_tensors_are_looked_up_once_and_mapped_again_after_unmap(runtime: Runtime) -> None:
    ranks = Ranks(1)
    source = PersistentTensors([torch.zeros(100, dtype=torch.uint8)])
    target = PersistentTensors([torch.zeros(100, dtype=torch.uint8)])
    assert not ranks.receivers[0].ready()
    for turn in range(6):
        source[0].fill_(turn)
        if turn == 3:
            ranks.receivers[0].unmap()
            assert runtime.mapped == []
        if turn == 5:
            # The sender's tensors are in other memory now.
            runtime.number += 1
            source = PersistentTensors([torch.full((100,), turn, dtype=torch.uint8)])
        lookups = runtime.lookups
        reading = ranks.threads.submit(take_part, ranks.receivers[0], target)
        take_part(ranks.sender, source)
        reading.result(10)
        assert torch.equal(target[0], source[0])
        assert (runtime.lookups > lookups) == (turn in (0, 5)) and runtime.mapped
    ranks.sender.broadcast(source, root=0, deadline=Deadline(10))
    assert ranks.receivers[0].ready()


def test_memory_that_was_freed_and_allocated_again_fails_one_broadcast(runtime: Runtime) -> None:
    ranks = Ranks(1)
    source = PersistentTensors([torch.ones(100, dtype=torch.uint8)])
    target = PersistentTensors([torch.zeros(100, dtype=torch.uint8)])
    for turn, fails in enumerate((False, False, True, False)):
        runtime.number += fails
        source[0].fill_(turn)
        reading = ranks.threads.submit(take_part, ranks.receivers[0], target)
        with pytest.raises(RuntimeError, match="in other memory") if fails else contextlib.nullcontext():
            take_part(ranks.sender, source)
        reading.result(10)
    assert torch.equal(target[0], source[0])


def test_other_sizes_are_refused(runtime: Runtime) -> None:
    ranks = Ranks(1)
    reading = ranks.threads.submit(take_part, ranks.receivers[0], [torch.zeros(5, dtype=torch.uint8)])
    ranks.sender.broadcast([torch.zeros(6, dtype=torch.uint8)], root=0, deadline=Deadline(10))
    with pytest.raises(RuntimeError, match=r"^tensor 0: the sender has 6 bytes, and this rank expects 5$"):
        reading.result(10)


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_a_rank_that_leaves_is_named_at_once(runtime: Runtime, who: str) -> None:
    ranks = Ranks(1)
    tensor = torch.zeros(5, dtype=torch.uint8)
    stays, leaves = (ranks.receivers[0], ranks.sender) if who == "sender" else (ranks.sender, ranks.receivers[0])
    waiting = ranks.threads.submit(take_part, stays, [tensor])
    time.sleep(0.2)
    start = time.perf_counter()
    leaves.close()
    with pytest.raises(RuntimeError, match=f"rank {leaves.rank} left the weight group"):
        waiting.result(10)
    assert time.perf_counter() - start < 1.0
