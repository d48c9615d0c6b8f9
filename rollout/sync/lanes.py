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
    Holders,
    Lane,
    PhaseTimer,
    TransferPlan,
    WeightBroadcaster,
    WeightSource,
    host_store,
    join_group,
    statement_to_text,
)
from rollcast.comm.agreement import Agreement
from rollcast.comm.device.nvml import NVLINK
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
from rollcast.rollout.sync.published_plan import Blueprint, merge_statements, publish_plan, read_plan

# Most messages of a lane for which "auto" lets a worker read the trainer's memory over NVLink. That is faster for few
# tensors, but costs more for each message than NCCL does: for the 18,867 tensors of Qwen3-30B-A3B NCCL is faster.
MAX_IPC_MESSAGES = 4096
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
        # What each rank holds, as it was stated and merged (rank 0).
        self._statements: Sequence[str] = ()
        self._holders: Holders
        self.plan: TransferPlan | None = None

    def exchange_statements(self, topic: str, *, deadline: Deadline) -> None:
        """Let rank 0 know what every rank holds, unless there is a plan. Collective over the trainer ranks.

        Raises `ValueError` on all ranks where they disagree about a parameter or leave a hole in it, and `SyncError`
        naming a rank that does not come in time.
        """
        if self.plan is not None:
            return

        def take(statements: Sequence[str]) -> str:
            self._statements, self._holders = statements, merge_statements(statements)
            return COMPLETE

        own = statement_to_text(self._source.statement)
        verdict = self._agreement.decide(f"{topic}/holdings", own, take, deadline=deadline)
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
            plan = read_plan(store, verdict.value.parts, self._config, rank=self._rank)
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
        self._groups, self.plan, self._store = {}, None, None

    def _host_rendezvous(self, deadline: Deadline) -> Rendezvous:
        """Rank 0: collect the workers' landing plans and publish a blueprint made of them."""
        try:
            replies = self._client.request_each(Prepare(self._holders.manifest.to_bytes()), deadline=deadline)
            digests = [expect(reply, Prepared).digests for reply in replies]
            landings: dict[str, bytes] = {}
            for engine, of_engine in enumerate(digests):
                if not landings.keys() >= set(of_engine):
                    request = self._client.request(engine, DescribeLanding())
                    (reply,) = collect({engine: request}, deadline=deadline)
                    landings |= zip(of_engine, expect(reply, LandingPlans).plans, strict=True)
            self._store, address = host_store(self._host, timeout_s=deadline.left_s())
            workers = [digest for of_engine in digests for digest in of_engine]
            blueprint = Blueprint(self._statements, landings, workers)
            return Rendezvous(address, publish_plan(blueprint, self._store, self._holders, self._config))
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


def choose_transport(lane: Lane, *, config: RolloutConfig, ranks: Sequence[RankInfo]) -> str:
    """Return the transport of a lane: as configured, or for "auto" the fastest that the ranks' GPUs allow.

    `ranks` is in rank order.
    """
    if config.resolved_device() == "cpu":
        return "gloo"
    if config.transport != "auto":
        return config.transport
    sender, receivers = ranks[lane.sender], [ranks[config.trainers + worker] for worker in lane.workers]
    local = [receiver for receiver in receivers if receiver.host == sender.host]
    if any(receiver.gpu == sender.gpu for receiver in local):
        # NCCL cannot join two ranks on one GPU.
        return "ipc"
    # Several readers would share the bandwidth of the sender's links, where NCCL's can pass on what they have.
    single = len(local) == len(receivers) == 1 and sender.links.get(local[0].gpu or "") == NVLINK
    return "ipc" if single and len(lane.messages) <= MAX_IPC_MESSAGES else "nccl"


def _of_rank_0(values: Sequence[Rendezvous]) -> Rendezvous:
    return values[0]


def _close_late(joining: "Future[dict[int, Group]]") -> None:
    """Close groups that were joined too late to be used."""
    if not joining.cancelled() and joining.exception() is None:
        _close_all(joining.result().values())


def _close_all(groups: Iterable[Group]) -> None:
    for group in groups:
        group.close()
