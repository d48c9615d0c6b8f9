"""`join`: turn the ranks of a torchrun job into trainers and engines (every rank)."""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import distributed as dist
from torch import nn

from rollcast.comm import Conversion, Deadline, open_source
from rollcast.comm.agreement import Agreement
from rollcast.comm.transport.rendezvous import reachable_host
from rollcast.rollout.config import RolloutConfig
from rollcast.rollout.job.preflight import describe, preflight
from rollcast.rollout.job.supervisor import supervise_engine, wait_for_job_end
from rollcast.rollout.job.world import World, narrow_to_trainers
from rollcast.rollout.orchestrator import Mode, Orchestrator
from rollcast.rollout.orchestrator.generation import Batch
from rollcast.rollout.pool import Pool
from rollcast.rollout.pool.dispatcher import DeterministicRequests
from rollcast.rollout.protocol.registry import EngineRegistry, RankInfo
from rollcast.rollout.sync import PoolBroadcaster, refuse_first_sync

logger = logging.getLogger(__name__)

STORE_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 10.0
# Every rank joins equally often, so the n-th job of a process belongs to the n-th of the others.
JOINS = itertools.count()


@dataclass(kw_only=True)
class Job:
    """One rank's part of a job, as `join` yields it; on engine ranks when their work is over."""

    config: RolloutConfig
    world: World
    ranks: list[RankInfo]
    """What each rank runs on, in rank order."""
    _pool: Pool | None
    _agreement: Agreement | None
    _stack: ExitStack
    _broadcasters: list[PoolBroadcaster] = field(default_factory=list)
    # Those that could not be made count, too: the ranks must stay in step.
    _broadcaster_numbers: Iterator[int] = field(default_factory=itertools.count)
    _orchestrators: Iterator[int] = field(default_factory=itertools.count)

    @property
    def is_trainer(self) -> bool:
        """Whether this rank trains."""
        return self.world.is_trainer

    @property
    def trainer_rank(self) -> int:
        """Rank among the trainers: `[0, trainers)`."""
        assert self.is_trainer
        return self.world.rank

    @property
    def pool(self) -> Pool:
        """Pool of all engines. Trainer ranks only."""
        if self._pool is None:
            raise RuntimeError("only trainer ranks have a pool: check job.is_trainer first")
        return self._pool

    def broadcaster(
        self,
        weights: nn.Module | Mapping[str, torch.Tensor],
        *,
        transport: str | None = None,
        adapter: str | None = None,
        names: Conversion | None = None,
        keep: Sequence[str] = (),
        keep_frozen: bool = False,
    ) -> PoolBroadcaster:
        """Return a broadcaster of these weights (see `WeightSource` for what they may be). Trainer ranks only.

        From a peft model it sends only the LoRA adapter if the engines have a `lora_rank`, else the base weights with
        the adapter merged into them; `adapter` names one where several are active.

        Engines take checkpoint names. Those of a transformers model are found by transformers' own conversion, run
        backwards as in `save_pretrained`; for a state dict in such a model's names pass `checkpoint_names(model)`. A
        function of your own takes the trainer's full tensors by name and returns the checkpoint's (see `Conversion`).

        Every weight of the engines' model must be sent, but for parts that you say they keep as they have loaded
        them, unchecked: `keep` has names of modules or parameters (`keep=["visual", "layers.0"]`; `*` and `?` match
        parts of a name), whether the trainer has them or not; `keep_frozen` keeps parameters with
        `requires_grad=False`. What vLLM's own loader skips is left out with a warning.

        Not collective, but every trainer rank needs one to take part in its syncs. An earlier broadcaster of this job
        is closed: the engines belong to one group at a time. `transport`: None, as configured. Raises `ValueError`
        for weights that cannot be sent, and for adapters that engines would compute differently, and names them; the
        other ranks' first sync then raises it, too.
        """
        agreement = self._agreement
        assert agreement is not None
        if not self.config.trainer_gpus and self.config.resolved_device() == "cuda":
            raise ValueError("trainers without GPUs (trainer_gpus=False) cannot send weights to engines that have some")
        name = f"sync/{next(self._broadcaster_numbers)}"
        adapters = self.config.lora_rank is not None
        try:
            source = open_source(
                weights, adapters=adapters, adapter=adapter, names=names, keep=keep, keep_frozen=keep_frozen
            )
        except Exception as error:
            # The other ranks' first sync would wait for this rank.
            refuse_first_sync(agreement, name, error)
            raise
        broadcaster = PoolBroadcaster(
            source,
            self.pool,
            agreement,
            config=replace(self.config, transport=transport or self.config.transport),
            ranks=self.ranks,
            rank=self.world.rank,
            host=reachable_host(self.world.master_addr),
            name=name,
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
        """Return an `Orchestrator` that calls these in step on every trainer rank. Trainer ranks only, not collective.

        `generate(batch)` returns this rank's part of a batch, numbered from 0; `train` and `dropped` get that part,
        and `sync(version)` lets the broadcaster sync. `waiting()` is entered while there is nothing to do but wait
        for generation. A run that fails while requests are in flight closes the pool. Raises `ValueError` for a mode
        that cannot be deterministic if the config demands it.
        """
        if self.config.deterministic and mode.max_staleness:
            raise ValueError(f"deterministic engines need on_policy(): in {mode.name} mode, results depend on timing")
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
    """Start this rank's part of the job. Collective over all ranks of the torchrun job.

        with rollcast.join(config) as job:
            if job.is_trainer:
                ...

    On trainer ranks the block begins when all engines serve; inside, torch.distributed sees a job of the trainer
    ranks only, so `init_process_group()`, FSDP2 and DDP work as if there were no engines. On engine ranks it begins
    when the trainers are done; until then they serve. Raises `PreflightError` before anything is started if the job
    cannot work, and `EngineError` on the trainers if an engine does not start.
    """
    world = World.from_env(
        trainers=config.trainers,
        tensor_parallel_size=config.tensor_parallel_size,
        colocate=config.colocate,
        trainer_gpus=config.trainer_gpus,
    )
    connect = partial(world.store, timeout_s=STORE_TIMEOUT_S, scope=f"join-{next(JOINS)}")
    store = connect()
    ranks = preflight(config, world, store)
    for line in describe(ranks) if world.rank == 0 else ():
        logger.info(line)
    with ExitStack() as stack:
        if world.is_trainer:
            stack.enter_context(narrow_to_trainers(world))
            yield from _train(config, world, ranks, connect, stack)
        else:
            if world.is_leader:
                supervise_engine(config, world, store)
            else:
                wait_for_job_end(EngineRegistry(store, engines=world.engines))
            yield Job(config=config, world=world, ranks=ranks, _pool=None, _agreement=None, _stack=stack)


def _train(
    config: RolloutConfig, world: World, ranks: list[RankInfo], connect: Callable[[], dist.Store], stack: ExitStack
) -> Iterator[Job]:
    """Yield the job of a trainer rank once all engines serve, and end the job behind it."""
    # Three connections: a wait on one blocks every other user of it, whatever the thread.
    registry = EngineRegistry(connect(), engines=world.engines)
    watched_registry = EngineRegistry(connect(), engines=world.engines)
    agreement = Agreement(connect(), rank=world.rank, size=world.trainers)
    try:
        addresses = registry.addresses(deadline=Deadline(config.start_timeout_s))
        pool = Pool(
            watched_registry,
            addresses,
            max_model_len=config.resolved_max_model_len(),
            rank=world.rank,
            deterministic=DeterministicRequests(config.seed, rank=world.rank) if config.deterministic else None,
        )
        stack.callback(pool.close)
        if config.metrics_port is not None:
            pool.metrics.serve(config.metrics_port + world.rank)
        yield Job(config=config, world=world, ranks=ranks, _pool=pool, _agreement=agreement, _stack=stack)
        # The last trainer to leave ends the job: engines must not stop while another generates.
        registry.finish_together(world.trainers)
    finally:
        registry.finish()
        if world.rank == 0:
            _wait_for_engines(registry)


def _wait_for_engines(registry: EngineRegistry) -> None:
    """Wait until all engines have stopped: rank 0 may host the store, and the user's shell should not return before."""
    deadline = Deadline(STOP_TIMEOUT_S)
    while not registry.all_stopped() and deadline.left_s():
        time.sleep(0.05)
