"""The lanes between trainer ranks and workers: plan them once, join their groups (every trainer rank)."""

import base64
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import msgspec
import torch
from torch import distributed as dist

from rollcast.comm import Deadline, Group, Lane, Manifest, TransferPlan, build_transfer, host_store, join_group
from rollcast.comm.agreement import Agreement, first_error
from rollcast.comm.device.nvml import NVLINK
from rollcast.comm.transport.rendezvous import connect_store
from rollcast.rollout.config import RolloutConfig
from rollcast.rollout.errors import RollcastError
from rollcast.rollout.pool.client import collect
from rollcast.rollout.pool.pool import Pool
from rollcast.rollout.protocol.messages import (
    Assignment,
    DescribeLanding,
    JoinGroup,
    LandingPlans,
    Prepare,
    Prepared,
    expect,
)
from rollcast.rollout.protocol.registry import Card

PREPARED, FAILED = "prepared ", "failed "
# What is left of the deadline is for telling the other ranks.
TELLING_SHARE = 0.1
# torch's store cuts whoever sends it more than 8 MiB at a time.
PART_BYTES = 4 << 20


class Blueprint(msgspec.Struct, frozen=True):
    """What trainer rank 0 tells the others; each makes the same `TransferPlan` of it."""

    landings: dict[str, bytes]
    """`LandingPlan.to_bytes()` by digest, every different one once."""
    workers: list[str]
    """Digest of each worker's plan, engine by engine."""
    digest: str
    """Of the transfer plan."""


class Lanes:
    """The transfer plan, and the groups of the lanes that this trainer rank sends."""

    def __init__(
        self,
        pool: Pool,
        agreement: Agreement,
        manifest: Manifest,
        *,
        config: RolloutConfig,
        rank: int,
        cards: Sequence[Card],
    ) -> None:
        self._pool = pool
        self._agreement = agreement
        self._manifest = manifest
        self._config = config
        self._rank = rank
        self._cards = cards
        on_gpu = config.resolved_device() == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self._store: dist.TCPStore | None = None
        self.groups: dict[int, Group] = {}
        self.plan: TransferPlan | None = None

    def open(self, topic: str, host: str, deadline: Deadline) -> TransferPlan:
        """Make the plan and join the groups, unless that is done. Collective over the trainer ranks.

        Rank 0 asks every worker where the parameters land. Raises on all ranks, with the same words, if anything
        fails on any; `topic` must be new each time.
        """
        if self.plan is not None:
            return self.plan
        work = Deadline(max(deadline.left_s() * (1.0 - TELLING_SHARE), 0.001))
        told = self._prepare(host, work) if self._rank == 0 else ""
        told = self._agreement.decide(f"{topic}/lanes", "", lambda _: told, deadline=deadline)
        if not told.startswith(PREPARED):
            raise RollcastError(told.removeprefix(FAILED))
        count, _, address = told.removeprefix(PREPARED).partition(" ")
        plan, store, words = None, None, ""
        try:
            store = connect_store(address, work)
            plan = self._plan(store, int(count))
        except Exception as error:
            words = str(error) or type(error).__name__
        # From here on nobody is late: rank 0 may give up, and end the store, at any time.
        words = self._agreement.decide(f"{topic}/planned", words, first_error, deadline=deadline)
        if words or plan is None or store is None:
            raise RollcastError(words)
        try:
            self._join(plan, store, address, work)
        except Exception as error:
            words = str(error) or type(error).__name__
        words = self._agreement.decide(f"{topic}/joined", words, first_error, deadline=deadline)
        if words:
            raise RollcastError(words)
        self.plan = plan
        return plan

    def close(self) -> None:
        """Leave all groups; the next `open` makes a new plan. Idempotent."""
        for group in self.groups.values():
            group.close()
        self.groups, self.plan, self._store = {}, None, None

    def _prepare(self, host: str, deadline: Deadline) -> str:
        """Rank 0: collect the workers' landing plans. What to tell the others, failure included."""
        try:
            replies = self._pool.ask_all(Prepare(self._manifest.to_bytes()), deadline=deadline)
            digests = [expect(reply, Prepared).digests for reply in replies]
            landings: dict[str, bytes] = {}
            for engine, its in enumerate(digests):
                if not landings.keys() >= set(its):
                    reply = self._pool.request(engine, DescribeLanding())
                    (plans,) = collect([reply], deadline=deadline)
                    landings |= zip(its, expect(plans, LandingPlans).plans, strict=True)
            self._store, address = host_store(host, timeout_s=deadline.left_s())
            blueprint = Blueprint(landings, [digest for its in digests for digest in its], "")
            blueprint = msgspec.structs.replace(blueprint, digest=self._make(blueprint).digest)
            return f"{PREPARED}{self._publish(blueprint)} {address}"
        except Exception as error:
            return FAILED + (str(error) or type(error).__name__)

    def _publish(self, blueprint: Blueprint) -> int:
        """Rank 0: put the blueprint into the groups' store; the number of its parts."""
        assert self._store is not None
        text = base64.b64encode(msgspec.msgpack.encode(blueprint)).decode()
        starts = range(0, len(text), PART_BYTES)
        for part, start in enumerate(starts):
            self._store.set(f"blueprint/{part}", text[start : start + PART_BYTES])
        return len(starts)

    def _make(self, blueprint: Blueprint) -> TransferPlan:
        # Not at the top: `python -m rollcast.rollout.landing` must not find itself imported.
        from rollcast.rollout.landing.plan import LandingPlan

        landings = {digest: LandingPlan.from_bytes(plan).moves for digest, plan in blueprint.landings.items()}
        return build_transfer(
            self._manifest,
            landings,
            blueprint.workers,
            senders=self._config.trainers,
            bucket_bytes=self._config.bucket_bytes,
            paired=self._config.colocate,
        )

    def _plan(self, store: dist.Store, parts: int) -> TransferPlan:
        """The plan that rank 0 has published."""
        text = b"".join(store.get(f"blueprint/{part}") for part in range(parts))
        blueprint = msgspec.msgpack.decode(base64.b64decode(text), type=Blueprint)
        plan = self._make(blueprint)
        if plan.digest != blueprint.digest:
            raise ValueError(
                f"trainer rank {self._rank} made another transfer plan than rank 0: run one version of rollcast"
            )
        return plan

    def _join(self, plan: TransferPlan, store: dist.Store, address: str, deadline: Deadline) -> None:
        """Join this rank's lanes; rank 0 also makes the workers join."""
        joining: list[Future[Any]] = self._send_for_workers(plan, address, deadline) if self._rank == 0 else []
        # On a thread: an engine that fails to join is heard of at once, not when the deadline is over.
        thread = ThreadPoolExecutor(1, thread_name_prefix="rollcast-join")
        own = thread.submit(self._join_own, plan, store, deadline)
        thread.shutdown(wait=False)
        try:
            wait([*joining, own], timeout=deadline.left_s(), return_when=FIRST_EXCEPTION)
            collect([future for future in joining if future.done()])
            if not own.done():
                missing = [str(engine) for engine, future in enumerate(joining) if not future.done()]
                whose = f"engine {', '.join(missing)}" if missing else "a worker"
                raise TimeoutError(f"{whose} did not join the weight group at {address} in time")
            self.groups = own.result()
            collect(joining, deadline=deadline)
        except Exception:
            own.add_done_callback(_close_late)
            # On rank 0 this ends the store: whoever waits for peers there fails at once.
            self._store = None
            raise

    def _join_own(self, plan: TransferPlan, store: dist.Store, deadline: Deadline) -> dict[int, Group]:
        join = partial(join_group, rank=0, deadline=deadline, device=self.device, label=f"trainer rank {self._rank}")
        own = [lane for lane in plan.lanes if lane.sender == self._rank]
        try:
            return {
                lane.index: join(self._transport(lane), store, size=1 + len(lane.workers), name=f"lane-{lane.index}")
                for lane in own
            }
        except dist.DistNetworkError:
            raise RollcastError("trainer rank 0 gave up before all had joined the weight groups") from None

    def _send_for_workers(self, plan: TransferPlan, address: str, deadline: Deadline) -> "list[Future[Any]]":
        size = self._config.tensor_parallel_size
        requests: list[Future[Any]] = []
        for engine in range(self._pool.engines):
            workers = range(engine * size, (engine + 1) * size)
            assignments = [self._assignment(plan.lane_of(worker), worker) for worker in workers]
            request = JoinGroup(address, assignments, list(plan.walk), self._config.bucket_bytes, deadline.left_s())
            requests.append(self._pool.request(engine, request))
        return requests

    def _transport(self, lane: Lane) -> str:
        return transport_of(lane, config=self._config, cards=self._cards)

    def _assignment(self, lane: Lane, worker: int) -> Assignment:
        engine, rank = divmod(worker, self._config.tensor_parallel_size)
        place = lane.workers.index(worker) + 1, len(lane.workers) + 1
        label = f"worker {rank} of engine {engine}"
        return Assignment(lane.index, *place, lane.sender, lane.digest, self._transport(lane), label)


def _close_late(joining: "Future[dict[int, Group]]") -> None:
    """Nobody uses groups that were joined too late."""
    if not joining.cancelled() and joining.exception() is None:
        for group in joining.result().values():
            group.close()


def transport_of(lane: Lane, *, config: RolloutConfig, cards: Sequence[Card]) -> str:
    """How the lane's bytes travel: as configured, or as the ranks' GPUs allow. `cards` is in rank order."""
    if config.resolved_device() == "cpu":
        return "gloo"
    if config.transport != "auto":
        return config.transport
    sender, receivers = cards[lane.sender], [cards[config.trainers + worker] for worker in lane.workers]
    here = [receiver for receiver in receivers if receiver.host == sender.host]
    shared = any(receiver.gpu == sender.gpu for receiver in here)
    # Several readers would share what the sender's links can do, where NCCL's can pass on what they have.
    single = len(here) == len(receivers) == 1 and sender.links.get(here[0].gpu or "") == NVLINK
    return "ipc" if shared or single else "nccl"
