"""Engines and trainer ranks of one sync without vLLM: threads, real gloo groups, real stores, real plans."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from ranks import CPU, LONG_S, Memory, Weights
from torch import distributed as dist

from rollcast.comm import (
    Deadline,
    Lane,
    LaneGroups,
    Manifest,
    Move,
    PhaseTimer,
    Region,
    WeightReceiver,
    host_store,
    join_group,
)
from rollcast.comm.agreement import Agreement
from rollcast.comm.report import WorkerReport
from rollcast.comm.transfer.gathering import GatheringSource
from rollcast.rollout import RolloutConfig
from rollcast.rollout.errors import EngineError, Failure
from rollcast.rollout.landing.plan import LandingPlan
from rollcast.rollout.pool.client import collect
from rollcast.rollout.pool.metrics import Metrics
from rollcast.rollout.protocol.messages import (
    AbortSync,
    Commit,
    DescribeLanding,
    Done,
    Finalize,
    JoinGroup,
    LandingPlans,
    Prepare,
    Prepared,
    Receive,
    Received,
    Request,
)
from rollcast.rollout.sync.broadcaster import PoolBroadcaster


class Worker:
    """A worker that has a share of the rows of every parameter."""

    def __init__(self, index: int, size: int, ballast: int) -> None:
        self.index, self.size, self.ballast = index, size, ballast
        self.groups: LaneGroups | None = None

    def prepare(self, manifest: Manifest) -> str:
        moves: list[Move] = []
        live: Weights = {}
        for param, spec in enumerate(manifest.specs):
            rows = spec.shape[0] // self.size
            live[spec.name] = torch.zeros(rows, *spec.shape[1:], dtype=spec.dtype)
            source = Region.whole(spec.shape, spec.dtype).rows(self.index * rows, rows)
            moves.append(Move(param, source, spec.name, replace(source, offset=0)))
        self.memory = Memory(live)
        values = (torch.full((self.ballast,), self.index, dtype=torch.uint8),)
        self.plan = LandingPlan(manifest, (), tuple(moves), values=values)
        return self.plan.digest

    def join(self, request: JoinGroup) -> None:
        assignments = request.assignments[self.index]
        lanes = [
            Lane.build(
                self.plan.moves,
                request.order,
                index=each.lane,
                sender=each.sender,
                boxes=each.boxes,
                bucket_bytes=each.bucket_bytes,
            )
            for each in assignments
        ]
        assert [lane.digest for lane in lanes] == [each.digest for each in assignments]
        self.memory.events = []
        self.receiver = WeightReceiver(lanes, self.memory, device=CPU)
        join = partial(join_group, deadline=Deadline(request.timeout_s))
        self.groups = LaneGroups(
            {
                each.lane: join(
                    each.transport, request.address, rank=each.rank, size=each.size, name=f"lane-{each.lane}"
                )
                for each in assignments
            }
        )

    def receive(self, request: Receive) -> dict[str, float]:
        assert self.groups is not None
        assert self.receiver.digest == request.digests[self.index]
        timer, deadline = PhaseTimer(), Deadline(request.timeout_s)
        self.receiver.receive(self.groups, deadline=deadline, timer=timer, checksums=request.options.verify != "none")
        if request.options.verify == "full":
            self.receiver.verify(self.groups, deadline=deadline, timer=timer)
        return timer.phases_s

    def leave(self) -> None:
        if self.groups is not None:
            self.groups.close()
            self.groups = None


@dataclass
class Engines:
    """Stands in for the `Pool` of every trainer rank and its client, and for the engines behind them."""

    engines: int
    size: int
    ballast: int = 0
    fault: Callable[[int, int, Request], None] = lambda engine, worker, request: None
    """Called with (engine, worker, request) before a worker does anything."""
    seen: list[Request] = field(default_factory=list)
    versions: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.client = self
        self.metrics = Metrics()
        self.workers = [[Worker(w, self.size, self.ballast) for w in range(self.size)] for _ in range(self.engines)]
        self._threads = ThreadPoolExecutor(8 * self.engines * (self.size + 1))

    def request(self, engine: int, request: Request) -> "Future[Any]":
        self.seen.append(request)
        return self._threads.submit(self._answer, engine, request)

    def request_each(self, request: Request, *, deadline: Deadline | None = None) -> list[Any]:
        return collect({engine: self.request(engine, request) for engine in range(self.engines)}, deadline=deadline)

    def _answer(self, engine: int, request: Request) -> Any:
        match request:
            case Prepare():
                manifest = Manifest.from_bytes(request.manifest)
                return Prepared(self._all(engine, request, lambda worker: worker.prepare(manifest), phase="prepare"))
            case DescribeLanding():
                return LandingPlans([worker.plan.to_bytes() for worker in self.workers[engine]])
            case JoinGroup():
                self._all(engine, request, lambda worker: worker.join(request), phase="join")
            case Receive():
                phases = self._all(engine, request, lambda worker: worker.receive(request), phase="receive")
                if request.alone:
                    self.versions[engine] = request.version
                return Received([WorkerReport(request.first_rank + w, phases_s) for w, phases_s in enumerate(phases)])
            case Commit():
                try:
                    self.fault(engine, 0, request)
                except RuntimeError as error:
                    raise _engine_error(error, engine=engine, phase="commit") from error
                self.versions[engine] = request.version
            case AbortSync() | Finalize():
                pass
        return Done()

    def _all(self, engine: int, request: Request, act: Callable[[Worker], Any], *, phase: str) -> list[Any]:
        def run(worker: Worker) -> Any:
            joined = worker.groups
            try:
                self.fault(engine, worker.index, request)
                return act(worker)
            except BaseException:
                # Not a group that it has joined for a later sync.
                if worker.groups is joined:
                    worker.leave()
                raise

        futures = [self._threads.submit(run, worker) for worker in self.workers[engine]]
        # As an engine does: the first failure, not those that follow from it.
        for failed in wait(futures, return_when=FIRST_EXCEPTION).done:
            if failed.exception():
                futures = [failed]
        try:
            return [future.result() for future in futures]
        except Exception as error:
            for worker in self.workers[engine]:
                worker.leave()
            raise _engine_error(error, engine=engine, phase=phase) from error


def _engine_error(error: Exception, *, engine: int, phase: str) -> EngineError:
    return EngineError(failures=[Failure(text=str(error), engine=engine, phase=phase)])


class Sharded(GatheringSource):
    """Weights that are gathered on all ranks at the same time, as to merge an adapter into shards."""

    def __init__(self, weights: Weights, meeting: threading.Barrier) -> None:
        super().__init__(weights)
        self.meeting = meeting
        self.gathers = 0

    def gather(self, order: Sequence[int]) -> Iterator[tuple[int, Sequence[torch.Tensor]]]:
        self.gathers += 1
        for item in super().gather(order):
            self.meeting.wait(10.0)
            yield item


def gathering(weights: Weights | Sequence[Weights], count: int) -> list[Sharded]:
    """The sources of so many trainer ranks, which gather together: the same weights, or each its own."""
    meeting = threading.Barrier(count)
    of_ranks = [*weights] if isinstance(weights, Sequence) else [weights] * count
    return [Sharded(of_rank, meeting) for of_rank in of_ranks]


class Trainers:
    """Trainer ranks as threads, one for each source, with a broadcaster and a connection to the job's store each."""

    def __init__(self, sources: Sequence[Any], engines: Engines, **settings: Any) -> None:
        store, address = host_store("127.0.0.1", timeout_s=LONG_S)
        host, port = address.split(":")
        count = len(sources)
        config = RolloutConfig(
            model="",
            dtype="float32",
            device="cpu",
            trainers=count,
            tensor_parallel_size=engines.size,
            **{"bucket_bytes": 1024, "sync_timeout_s": 60.0} | settings,
        )
        self._store = store
        self._engines = engines
        self._threads = ThreadPoolExecutor(count)
        self.sources = sources
        pool: Any = engines
        self.broadcasters = [
            PoolBroadcaster(
                source,
                pool,
                Agreement(dist.TCPStore(host, int(port), is_master=False), rank=rank, size=count),
                config=config,
                rank=rank,
                host=host,
                name="sync/0",
                version=0,
            )
            for rank, source in enumerate(self.sources)
        ]

    def sync(self, *calls: dict[str, Any]) -> list[Any]:
        """Sync on all ranks, each with one of the calls, or all with the only one; return reports or errors."""
        each = calls if len(calls) > 1 else calls * len(self.broadcasters)
        futures = [self._threads.submit(rank.sync, **call) for rank, call in zip(self.broadcasters, each, strict=True)]
        wait(futures, LONG_S)
        return [future.exception(0.0) or future.result() for future in futures]

    def close(self) -> None:
        for broadcaster in self.broadcasters:
            broadcaster.close()
        for worker in (worker for workers in self._engines.workers for worker in workers):
            worker.leave()
