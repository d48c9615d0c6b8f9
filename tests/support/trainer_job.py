"""The trainer ranks of a job of torchrun's, and a worker that keeps every parameter whole (every trainer rank)."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from moves import whole_moves
from ranks import CPU, LONG_S, Weights, receive, receiver_of, send
from sides import memory_of
from torch import distributed as dist

from rollcast.comm import (
    Deadline,
    Holders,
    WeightBroadcaster,
    WeightSource,
    build_transfer,
    host_store,
    join_group,
)


class TrainerJob:
    """This rank's source, its lane to the worker, and on rank 0 the worker.

        job = TrainerJob(WeightSource(model))
        landed = job.sync()                 # on every trainer rank; on rank 0: what the worker has

    Needs torch's default process group, of gloo.
    """

    def __init__(self, source: WeightSource, *, bucket_bytes: int = 4096) -> None:
        self.rank = dist.get_rank()
        self.holders = Holders.of(all_objects(source.statement))
        moves = whole_moves(self.holders.manifest)
        self.plan = build_transfer(self.holders, {"w": moves}, ["w"], bucket_bytes=bucket_bytes)
        self._broadcaster = WeightBroadcaster(source, self.plan, rank=self.rank, device=CPU)
        self._memory = memory_of(self.holders.manifest, moves)
        self._receiver = receiver_of(self.plan.lanes, self._memory)
        self._threads = ThreadPoolExecutor(2)
        self._store, address = host_store("127.0.0.1", timeout_s=LONG_S) if self.rank == 0 else (None, "")
        address = all_objects(address)[0]
        joining: dict[tuple[str, int], Any] = {}
        for lane in self.plan.lanes:
            join = partial(join_group, "gloo", address, size=2, deadline=Deadline(LONG_S), name=f"lane {lane.index}")
            if lane.sender == self.rank:
                joining["sender", lane.index] = partial(join, rank=0)
            if self.rank == 0:
                joining["worker", lane.index] = partial(join, rank=1)
        with ThreadPoolExecutor(len(joining) or 1) as threads:
            groups = dict(zip(joining, threads.map(lambda call: call(), joining.values()), strict=True))
        self._senders = {lane: group for (side, lane), group in groups.items() if side == "sender"}
        self._workers = {lane: group for (side, lane), group in groups.items() if side == "worker"}

    def sync(self) -> Weights:
        """Send this rank's share; return what the worker has, on rank 0. Collective."""
        sent = self._threads.submit(send, self._broadcaster, self._senders, checksums=True)
        if self.rank == 0:
            receive(self._receiver, self._workers, checksums=True)
        sent.result(LONG_S)
        return self._memory.tensors

    def close(self) -> None:
        """Leave the lanes. Collective."""
        dist.barrier()
        for group in (*self._senders.values(), *self._workers.values()):
            group.close()


def all_objects(own: Any) -> list[Any]:
    """Return what every rank has. Collective."""
    objects: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(objects, own)
    return objects
