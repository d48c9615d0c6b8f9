"""Raw broadcasts of as many bytes as a sync from as many senders (every trainer rank of a layout)."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch

from latency.bench import RPC_TIMEOUT_S, Sample
from latency.layout_bench import LayoutBench, Span, sample
from rollcast.comm import Deadline, Group, host_store, join_group
from rollcast.comm.transport.rendezvous import connect_store
from rollcast.rollout.errors import EngineError
from rollcast.rollout.pool.client import collect
from rollcast.rollout.protocol.messages import Call, Called, Reply, expect

HOST = "127.0.0.1"
PIECE_BYTES = 1 << 30


def share_of(nbytes: int, sender: int, senders: int) -> list[int]:
    """Return the sizes of a sender's broadcasts: its even share of the bytes, in pieces."""
    share = nbytes * (sender + 1) // senders - nbytes * sender // senders
    whole, rest = divmod(share, PIECE_BYTES)
    return [PIECE_BYTES] * whole + [rest] * bool(rest)


class RawSenders:
    """One group for each trainer rank and all workers; in each, the rank sends its share. All are collective."""

    def __init__(self, bench: LayoutBench, nbytes: int) -> None:
        """Join the groups."""
        self._bench = bench
        self._ranks = bench.ranks
        self._pieces = [share_of(nbytes, sender, self._ranks.size) for sender in range(self._ranks.size)]
        self._updates = 0
        self._receiving: dict[int, Future[Reply]] = {}
        self.transport = transport_of(bench)
        self._store: Any = None
        self._device = bench.weights.local[0].device
        address = self._ranks.together(self._host)[0]
        self._group = self._join_failing_together(address)
        own = self._pieces[self._ranks.rank]
        self._buffer = torch.zeros(max(own), dtype=torch.uint8, device=self._device)

    @property
    def method(self) -> str:
        """Name of the row."""
        return "raw-ipc" if self.transport == "ipc" else "raw-broadcast"

    def update(self) -> Sample:
        """Send every share once, until all workers have all of it."""
        self._updates += 1
        self._ranks.together(self._post)
        return sample(self._ranks.together(self._send))

    def close(self) -> None:
        """Leave the groups on both sides."""
        self._ranks.together(self._group.close)
        self._ranks.together(self._let_workers_leave)
        self._store = None

    def _host(self) -> str:
        if self._ranks.rank:
            return ""
        self._store, address = host_store(HOST, timeout_s=RPC_TIMEOUT_S)
        return address

    def _join_failing_together(self, address: str) -> Group:
        groups: list[Group] = []
        self._ranks.together(lambda: groups.append(self._join(address)))
        return groups[0]

    def _join(self, address: str) -> Group:
        deadline = Deadline(RPC_TIMEOUT_S)
        rank, layout = self._ranks.rank, self._bench.layout
        size = layout.tensor_parallel_size
        client, joining = self._bench.job.pool.client, dict[int, Future[Reply]]()
        for engine in range(layout.engines if rank == 0 else 0):
            arguments = [self.transport, address, layout.trainers, engine * size, layout.workers, RPC_TIMEOUT_S]
            joining[engine] = client.request(engine, Call("bench_join_senders", arguments))
        if rank:
            self._store = connect_store(address, deadline)
        where: dict[str, Any] = {"device": self._device, "name": f"raw-{rank}"}
        group = join_group(self.transport, self._store, rank=0, size=1 + layout.workers, deadline=deadline, **where)
        collect(joining, deadline=deadline)
        return group

    def _let_workers_leave(self) -> None:
        if self._ranks.rank == 0:
            collect(self._request("bench_leave_senders"), deadline=Deadline(RPC_TIMEOUT_S))

    def _request(self, method: str, *arguments: Any) -> "dict[int, Future[Reply]]":
        client = self._bench.job.pool.client
        return {engine: client.request(engine, Call(method, list(arguments))) for engine in range(client.engines)}

    def _post(self) -> None:
        """Let the workers receive, and wait until all are about to (rank 0)."""
        if self._ranks.rank:
            return
        self._receiving = self._request("bench_receive_from_all", self._pieces, self._updates, RPC_TIMEOUT_S)
        deadline = Deadline(RPC_TIMEOUT_S)
        keys = [f"ready/{self._updates}/{worker}" for worker in range(self._bench.layout.workers)]
        while not self._store.check(keys):
            deadline.left("the workers")
            if any(reply.done() for reply in self._receiving.values()):
                collect({engine: reply for engine, reply in self._receiving.items() if reply.done()})
            time.sleep(0.001)

    def _send(self) -> Span:
        deadline = Deadline(RPC_TIMEOUT_S)
        start = time.perf_counter()
        try:
            pieces = self._pieces[self._ranks.rank]
            works = [self._group.broadcast([self._buffer[:size]], root=0, deadline=deadline) for size in pieces]
            for work in works:
                work.wait(deadline)
        except Exception:
            with suppress(RuntimeError):
                # Workers that wait for this rank fail at once.
                self._group.close()
            self._raise_of_workers()
            raise
        # All processes read the clock of one machine: a worker returns when it had everything.
        return Span(start, max(time.perf_counter(), *self._ends(deadline)))

    def _ends(self, deadline: Deadline) -> Sequence[float]:
        replies = collect(self._receiving, deadline=deadline)
        self._receiving = {}
        return [0.0, *(end for reply in replies for end in expect(reply, Called).results)]

    def _raise_of_workers(self) -> None:
        """Raise the workers' own error, if they have one."""
        failed = {engine: reply for engine, reply in self._receiving.items() if reply.done()}
        try:
            collect(failed)
        except EngineError as error:
            raise RuntimeError(str(error)) from None


def transport_of(bench: LayoutBench) -> str:
    """Return what the raw broadcasts use: NCCL cannot join two ranks on one GPU."""
    if not bench.on_gpu:
        return "gloo"
    return "ipc" if bench.layout.colocated else "nccl"
