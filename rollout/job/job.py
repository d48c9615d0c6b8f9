"""`join`: turns the ranks of a torchrun job into trainers and engines (every rank)."""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import distributed as dist
from torch import nn

from rollcast.comm import Deadline, open_source
from rollcast.comm.agreement import Agreement
from rollcast.comm.transport.rendezvous import reachable_host
from rollcast.rollout.config import RolloutConfig
from rollcast.rollout.job.preflight import describe, preflight
from rollcast.rollout.job.supervisor import idle, lead
from rollcast.rollout.job.world import World, narrow_to_trainers
from rollcast.rollout.orchestrator.generation import Batch
from rollcast.rollout.orchestrator.orchestrator import Orchestrator
from rollcast.rollout.orchestrator.schedule import Mode
from rollcast.rollout.pool.dispatcher import Repeatable
from rollcast.rollout.pool.pool import Pool
from rollcast.rollout.protocol.registry import Card, Roster
from rollcast.rollout.sync.broadcaster import PoolBroadcaster

logger = logging.getLogger(__name__)

STORE_TIMEOUT_S = 300.0
LEAVE_S = 10.0
# Every rank joins equally often, so the n-th job of a process meets the n-th of the others.
JOINS = itertools.count()


@dataclass(kw_only=True)
class Job:
    """What `join` gives a rank. On engine ranks, whose work is over by then, only the ranks are of interest."""

    config: RolloutConfig
    world: World
    cards: list[Card]
    """What every rank runs on, in rank order."""
    _pool: Pool | None
    _agreement: Agreement | None
    _stack: ExitStack
    _broadcasters: list[PoolBroadcaster] = field(default_factory=list)
    _orchestrators: Iterator[int] = field(default_factory=itertools.count)

    @property
    def is_trainer(self) -> bool:
        return self.world.is_trainer

    @property
    def trainer_rank(self) -> int:
        """This rank among the trainers: `[0, trainers)`."""
        assert self.is_trainer
        return self.world.rank

    @property
    def pool(self) -> Pool:
        """The engines. Trainer ranks only."""
        if self._pool is None:
            raise RuntimeError("only trainer ranks have a pool: check job.is_trainer first")
        return self._pool

    def broadcaster(
        self,
        weights: nn.Module | Mapping[str, torch.Tensor],
        *,
        transport: str | None = None,
        adapter: str | None = None,
    ) -> PoolBroadcaster:
        """A broadcaster of these weights (see `WeightSource` for what they may be). Trainer ranks only.

        Of a peft model it sends the LoRA adapter alone if the engines have a `lora_rank`, and else the base weights
        with the adapter folded in; `adapter` names one where several are active.

        Not collective, but every trainer rank needs one to take part in its syncs. It takes over from an earlier
        one, which is closed: the engines belong to one group at a time. `transport`: None, as configured. Raises
        `ValueError`, by name, for adapters that engines would compute differently.
        """
        pool, agreement = self.pool, self._agreement
        assert agreement is not None
        if not self.config.trainer_gpus and self.config.resolved_device() == "cuda":
            raise ValueError("trainers without GPUs (trainer_gpus=False) cannot send weights to engines that have some")
        broadcaster = PoolBroadcaster(
            open_source(
                weights,
                adapters=self.config.lora_rank is not None,
                adapter=adapter,
                dtype=self.config.torch_dtype(),
            ),
            pool,
            agreement,
            config=replace(self.config, transport=transport or self.config.transport),
            cards=self.cards,
            rank=self.world.rank,
            host=reachable_host(self.world.master_addr),
            name=f"sync/{len(self._broadcasters)}",
            version=self._broadcasters[-1].version if self._broadcasters else 0,
        )
        if self._broadcasters:
            self._broadcasters[-1].close()
        self._broadcasters.append(broadcaster)
        self._stack.callback(broadcaster.close)
        return broadcaster

    def orchestrator(
        self,
        mode: Mode,
        *,
        generate: Callable[[int], Batch],
        train: Callable[[Batch], None],
        sync: Callable[[int], object],
        dropped: Callable[[Batch], None] = lambda batch: None,
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Orchestrator[Batch]:
        """What calls these on every trainer rank in step, see `Orchestrator`. Trainer ranks only, not collective.

        `generate(batch)` returns what this rank made of a batch, numbered from 0. `train(batch)` and
        `dropped(batch)` are handed it, `sync(version)` has the broadcaster sync. `waiting()` is entered while there
        is nothing to do but wait for generation. A run that fails while requests are under way closes the pool.
        Raises `ValueError` for a mode that cannot be deterministic, if that is wanted.
        """
        if self.config.deterministic and mode.max_staleness:
            raise ValueError(f"deterministic engines need on_policy(): in {mode.name} mode, what meets what is chance")
        pool, agreement = self.pool, self._agreement
        assert agreement is not None
        return Orchestrator(
            mode,
            generate=generate,
            train=train,
            sync=sync,
            dropped=dropped,
            waiting=waiting,
            cancel=pool.close,
            agreement=agreement,
            rank=self.trainer_rank,
            name=f"orchestrator/{next(self._orchestrators)}",
            version=lambda: self._broadcasters[-1].version if self._broadcasters else 0,
            timeout_s=self.config.trainer_timeout_s,
        )


@contextmanager
def join(config: RolloutConfig) -> Iterator[Job]:
    """Take this rank's place in the job. Collective over all ranks of the torchrun job.

        with rollcast.join(config) as job:
            if job.is_trainer:
                ...

    On trainer ranks it returns when all engines serve; inside, torch.distributed sees a job of the trainer
    ranks only, so `init_process_group()`, FSDP2 and DDP work as if there were no engines. On engine ranks it
    serves, and returns when the trainers are done. Raises `PreflightError` before anything is started if the
    job cannot work, `EngineError` on the trainers if an engine does not start.
    """
    world = World.from_env(
        trainers=config.trainers,
        tensor_parallel_size=config.tensor_parallel_size,
        colocate=config.colocate,
        trainer_gpus=config.trainer_gpus,
    )
    connect = partial(world.store, timeout_s=STORE_TIMEOUT_S, scope=f"join-{next(JOINS)}")
    store = connect()
    cards = preflight(config, world, store)
    for line in describe(cards) if world.rank == 0 else ():
        logger.info(line)
    with ExitStack() as stack:
        if world.is_trainer:
            stack.enter_context(narrow_to_trainers(world))
            yield from _train(config, world, cards, connect, stack)
        else:
            if world.is_leader:
                lead(config, world, store)
            else:
                idle(Roster(store, engines=world.engines))
            yield Job(config=config, world=world, cards=cards, _pool=None, _agreement=None, _stack=stack)


def _train(
    config: RolloutConfig, world: World, cards: list[Card], connect: Callable[[], dist.Store], stack: ExitStack
) -> Iterator[Job]:
    # Three connections: a wait on one blocks every other user of it, whatever the thread.
    roster = Roster(connect(), engines=world.engines)
    watched = Roster(connect(), engines=world.engines)
    agreement = Agreement(connect(), rank=world.rank, size=world.trainers)
    try:
        addresses = roster.addresses(deadline=Deadline(config.start_timeout_s))
        pool = Pool(
            watched,
            addresses,
            max_model_len=config.resolved_max_model_len(),
            rank=world.rank,
            repeatable=Repeatable(config.seed, rank=world.rank) if config.deterministic else None,
        )
        stack.callback(pool.close)
        if config.metrics_port is not None:
            pool.metrics.serve(config.metrics_port + world.rank)
        yield Job(config=config, world=world, cards=cards, _pool=pool, _agreement=agreement, _stack=stack)
        # The last one out says that the job is over: engines must not stop while a trainer generates.
        roster.finish_with(world.trainers)
    finally:
        roster.finish()
        if world.rank == 0:
            _wait_for_engines(roster)


def _wait_for_engines(roster: Roster) -> None:
    """Rank 0 may host the store, and the user's shell should not come back before the engines are gone."""
    end = time.monotonic() + LEAVE_S
    while not roster.all_left() and time.monotonic() < end:
        time.sleep(0.05)
