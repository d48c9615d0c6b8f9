"""The lanes between trainer ranks and workers: planned once, joined, sent on in every sync (every trainer rank)."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import msgspec
import torch
from torch import distributed as dist

from rollcast.comm import (
    Deadline,
    Group,
    Lane,
    PhaseTimer,
    TransferPlan,
    WeightBroadcaster,
    WeightSource,
    host_store,
    join_group,
)
from rollcast.comm.agreement import Agreement
from rollcast.comm.transport.rendezvous import connect_store
from rollcast.rollout.config import RolloutConfig
from rollcast.rollout.errors import EngineError, Failure, RollcastError, SyncError
from rollcast.rollout.pool.client import EngineClient, collect
from rollcast.rollout.protocol.messages import (
    Assignment,
    DescribeLanding,
    JoinGroup,
    LandingPlans,
    Prepare,
    Prepared,
    Reply,
    expect,
)
from rollcast.rollout.protocol.registry import RankInfo
from rollcast.rollout.sync.outcome import StepOutcome, agree_on
from rollcast.rollout.sync.published_plan import Blueprint, Statements, publish_plan, read_plan, state
from rollcast.rollout.sync.replicas import Replicas
from rollcast.rollout.sync.transport_choice import choose_transport

# What rank 0 makes of all statements.
COMPLETE = "complete"


class Rendezvous(msgspec.Struct, frozen=True):
    """What rank 0 gives the other ranks to join the lanes, or why there are none. Empty from other ranks."""

    address: str = ""
    """Address of the groups' store, which has the blueprint."""
    parts: int = 0
    """Parts of the blueprint in the store."""
    outcome: StepOutcome = StepOutcome()


class Lanes:
    """The transfer plan, the groups of the lanes that this trainer rank sends, and their sender.

    lanes.open("sync/0/1", join_deadline=Deadline(43), deadline=Deadline(48))      # only the first time is work
    error = lanes.send(deadline=Deadline(48), timer=PhaseTimer(), checksums=False)
    """

    def __init__(
        self,
        client: EngineClient,
        agreement: Agreement,
        source: WeightSource,
        *,
        config: RolloutConfig,
        rank: int,
        host: str,
        ranks: Sequence[RankInfo],
    ) -> None:
        self._client = client
        self._agreement = agreement
        self._source = source
        self._config = config
        self._rank = rank
        self._host = host
        self._ranks = ranks
        on_gpu = config.resolved_device() == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self._store: dist.TCPStore | None = None
        self._groups: dict[int, Group] = {}
        self._sender: WeightBroadcaster | None = None
        self._replicas: Replicas
        # Of all ranks (rank 0).
        self._statements: Statements
        self.plan: TransferPlan | None = None

    def exchange_statements(self, topic: str, *, deadline: Deadline) -> None:
        """Let rank 0 know what every rank holds, unless there is a plan. Collective over the trainer ranks.

        Raises `ValueError` on all ranks where they disagree about a parameter or leave a hole in it, and `SyncError`
        naming a rank that does not come in time.
        """
        if self.plan is not None:
            return

        def take(texts: Sequence[str]) -> str:
            self._statements = Statements.of(texts)
            return COMPLETE

        verdict = self._agreement.decide(f"{topic}/holdings", state(self._source), take, deadline=deadline)
        if verdict.late_rank is not None:
            raise SyncError(verdict.error, failures=[Failure(text=verdict.error, phase="agree")])
        if verdict.error:
            raise ValueError(verdict.error)

    def open(self, topic: str, *, join_deadline: Deadline, deadline: Deadline) -> None:
        """Make the plan and join the groups, unless that is done. Collective over the trainer ranks.

        Rank 0 asks every worker where the parameters land. Raises `SyncError` with the same failures on all ranks if
        anything fails on any; `topic` must be new each time. `deadline` leaves time after `join_deadline` to agree.
        """
        if self.plan is not None:
            return
        agree = partial(agree_on, self._agreement, deadline=deadline)
        rendezvous = self._host_rendezvous(join_deadline) if self._rank == 0 else Rendezvous()
        verdict = self._agreement.decide(f"{topic}/lanes", rendezvous, _of_rank_0, deadline=deadline)
        if verdict.value is None:
            raise SyncError(verdict.error, failures=[Failure(text=verdict.error, phase="agree")])
        verdict.value.outcome.raise_failures()
        address = verdict.value.address
        plan, store, outcome = None, None, StepOutcome()
        try:
            store = connect_store(address, join_deadline)
            plan, holders = read_plan(store, verdict.value.parts, self._config, rank=self._rank)
            self._replicas = Replicas(self._agreement, self._source, holders, manifest=plan.manifest)
        except Exception as error:
            outcome = StepOutcome.of_error(error, phase="plan")
        # From here on nobody is late: rank 0 may give up, and end the store, at any time.
        agree(f"{topic}/planned", outcome).raise_failures()
        assert plan is not None and store is not None
        try:
            self._join(plan, store, address, join_deadline)
        except Exception as error:
            outcome = StepOutcome.of_error(error, phase="join")
        agree(f"{topic}/joined", outcome).raise_failures()
        self._sender = WeightBroadcaster(self._source, plan, rank=self._rank, device=self.device)
        self.plan = plan

    def compare_replicas(self, topic: str, *, deadline: Deadline) -> None:
        """Raise `SyncError` on all ranks where ranks hold different values of the same weights. Collective."""
        self._replicas.compare(topic, deadline=deadline)

    def send(self, *, deadline: Deadline, timer: PhaseTimer, checksums: bool) -> Exception | None:
        """Send every weight once. Collective over the trainer ranks.

        An error is returned, not raised: the other ranks may have another pass over the weights before them.
        """
        assert self._sender is not None
        try:
            # The ranks have compared their manifests when they agreed to start: `peek_manifest` was called then.
            self._sender.send(self._groups, deadline=deadline, timer=timer, checksums=checksums)
        except Exception as error:
            _close_all(self._groups.values())
            return error
        return None

    def group_closer(self) -> Callable[[], None]:
        """Return a function, for any thread, that closes the present groups and so ends every transfer under way."""
        return partial(_close_all, [*self._groups.values()])

    def release(self) -> None:
        """Release buffers and references to the weights' memory; the groups stay."""
        if self._sender is not None:
            self._sender.release()

    def close(self) -> None:
        """Leave all groups; the next `open` makes a new plan. Idempotent."""
        _close_all(self._groups.values())
        # The sender keeps buffers, and views of the weights.
        self._groups, self._sender, self.plan, self._store = {}, None, None, None

    def _host_rendezvous(self, deadline: Deadline) -> Rendezvous:
        """Rank 0: collect the workers' landing plans and publish a blueprint made of them."""
        try:
            stated = self._statements
            prepare = Prepare(stated.holders.manifest.to_bytes(), stated.kept.to_bytes())
            replies = self._client.request_each(prepare, deadline=deadline)
            digests = [expect(reply, Prepared).digests for reply in replies]
            landings: dict[str, bytes] = {}
            for engine, of_engine in enumerate(digests):
                if not landings.keys() >= set(of_engine):
                    request = self._client.request(engine, DescribeLanding())
                    (reply,) = collect({engine: request}, deadline=deadline)
                    landings |= zip(of_engine, expect(reply, LandingPlans).plans, strict=True)
            self._store, address = host_store(self._host, timeout_s=deadline.left_s())
            workers = [digest for of_engine in digests for digest in of_engine]
            blueprint = Blueprint(stated.texts, landings, workers)
            return Rendezvous(address, publish_plan(blueprint, self._store, stated.holders, self._config))
        except Exception as error:
            return Rendezvous(outcome=StepOutcome.of_error(error, phase="prepare"))

    def _join(self, plan: TransferPlan, store: dist.Store, address: str, deadline: Deadline) -> None:
        """Join this rank's lanes; rank 0 also makes the workers join."""
        joining = self._request_join(plan, address, deadline) if self._rank == 0 else {}
        # On a thread: an engine that fails to join is noticed at once, not when the deadline is over.
        thread = ThreadPoolExecutor(1, thread_name_prefix="rollcast-join")
        own = thread.submit(self._join_own, plan, store, deadline)
        thread.shutdown(wait=False)
        try:
            pending: list[Future[Any]] = [*joining.values(), own]
            wait(pending, timeout=deadline.left_s(), return_when=FIRST_EXCEPTION)
            collect({engine: reply for engine, reply in joining.items() if reply.done()})
            missing = [engine for engine, reply in joining.items() if not reply.done()]
            # The groups' own deadline may be over a moment before this one.
            if not own.done() or (missing and isinstance(own.exception(), TimeoutError | dist.DistStoreError)):
                text = f"did not join the weight group at {address} in time"
                failures = [Failure(text=text, engine=engine, phase="join") for engine in missing]
                raise EngineError(f"a worker {text}" if not missing else "", failures=failures)
            self._groups = own.result()
            collect(joining, deadline=deadline)
        except Exception:
            own.add_done_callback(_close_late)
            # On rank 0 this ends the store: ranks that wait for peers there fail at once.
            self._store = None
            raise

    def _join_own(self, plan: TransferPlan, store: dist.Store, deadline: Deadline) -> dict[int, Group]:
        join = partial(join_group, rank=0, deadline=deadline, device=self.device, label=f"trainer rank {self._rank}")
        # All ranks join their lanes in the order of the lanes: none waits for one that waits for it.
        own = [lane for lane in plan.lanes if lane.sender == self._rank]
        groups: dict[int, Group] = {}
        try:
            for lane in own:
                size, name = 1 + len(lane.workers), f"lane-{lane.index}"
                groups[lane.index] = join(self._transport(lane), store, size=size, name=name)
        except BaseException as error:
            _close_all(groups.values())
            if isinstance(error, dist.DistNetworkError):
                raise RollcastError("trainer rank 0 gave up before all had joined the weight groups") from None
            raise
        return groups

    def _request_join(self, plan: TransferPlan, address: str, deadline: Deadline) -> "dict[int, Future[Reply]]":
        size = self._config.tensor_parallel_size
        replies: dict[int, Future[Reply]] = {}
        for engine in range(self._client.engines):
            workers = range(engine * size, (engine + 1) * size)
            request = JoinGroup(
                address=address,
                assignments=[[self._assignment(lane, worker) for lane in plan.lanes_of(worker)] for worker in workers],
                order=list(plan.order),
                timeout_s=deadline.left_s(),
            )
            replies[engine] = self._client.request(engine, request)
        return replies

    def _assignment(self, lane: Lane, worker: int) -> Assignment:
        engine, rank = divmod(worker, self._config.tensor_parallel_size)
        return Assignment(
            lane=lane.index,
            rank=lane.workers.index(worker) + 1,
            size=len(lane.workers) + 1,
            sender=lane.sender,
            digest=lane.digest,
            boxes=None if lane.boxes is None else {param: list(boxes) for param, boxes in lane.boxes.items()},
            bucket_bytes=lane.bucket_bytes,
            transport=self._transport(lane),
            label=f"worker {rank} of engine {engine}",
        )

    def _transport(self, lane: Lane) -> str:
        return choose_transport(lane, config=self._config, ranks=self._ranks)


def _of_rank_0(values: Sequence[Rendezvous]) -> Rendezvous:
    return values[0]


def _close_late(joining: "Future[dict[int, Group]]") -> None:
    """Close groups that were joined too late to be used."""
    if not joining.cancelled() and joining.exception() is None:
        _close_all(joining.result().values())


def _close_all(groups: Iterable[Group]) -> None:
    for group in groups:
        group.close()
