"""The ranks of the job and their roles, from torchrun's environment, which is read only here (every rank)."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from torch import distributed as dist

from rollcast.rollout.errors import PreflightError

TORCHRUN_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_")
TORCHRUN_NAMES = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks of one torchrun job and their roles: trainers first, then engines of consecutive ranks."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    trainers: int
    tensor_parallel_size: int
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    agent_store: bool = True
    restart: str = "0"
    colocate: bool = False
    """Whether engine ranks use the trainers' GPUs. One machine only."""
    trainer_gpus: bool = True
    """Whether trainer ranks use GPUs."""

    def __post_init__(self) -> None:
        rest = self.world_size - self.trainers
        if rest < self.tensor_parallel_size or rest % self.tensor_parallel_size:
            engines = max(1, rest // self.tensor_parallel_size)
            raise PreflightError(
                f"world size {self.world_size} does not fit trainers={self.trainers} plus engines of "
                f"tensor_parallel_size={self.tensor_parallel_size}: start "
                f"{self.trainers} + {self.tensor_parallel_size} x engines ranks, "
                f"for example --nproc-per-node {self.trainers + engines * self.tensor_parallel_size}"
            )
        if self.colocate and (rest != self.trainers or self.local_world_size != self.world_size):
            raise PreflightError(
                f"colocate=True puts engine rank trainers + i on trainer rank i's GPU: it needs as many engine ranks "
                f"as trainers ({self.trainers}), got {rest}, all on one machine"
            )

    @classmethod
    def from_env(
        cls,
        *,
        trainers: int,
        tensor_parallel_size: int,
        colocate: bool = False,
        trainer_gpus: bool = True,
        environ: Mapping[str, str] = os.environ,
    ) -> "World":
        """Read torchrun's variables. Raises `PreflightError` when the process was not started by torchrun."""
        if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environ]:
            raise PreflightError(f"{missing[0]} is not set: start the job with torchrun")
        return cls(
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ.get("LOCAL_RANK", "0")),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", "1")),
            trainers=trainers,
            tensor_parallel_size=tensor_parallel_size,
            master_addr=environ["MASTER_ADDR"],
            master_port=int(environ["MASTER_PORT"]),
            agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            restart=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            colocate=colocate,
            trainer_gpus=trainer_gpus,
        )

    @property
    def is_trainer(self) -> bool:
        """Whether this rank trains."""
        return self.rank < self.trainers

    def has_gpu(self, rank: int) -> bool:
        """Return whether a rank uses a GPU, where there are any."""
        return self.trainer_gpus or rank >= self.trainers

    @property
    def gpu_index(self) -> int:
        """Index of this rank's GPU among the visible ones of its machine, if it has one."""
        if self.is_trainer or (self.trainer_gpus and not self.colocate):
            return self.local_rank
        first = self.rank - self.local_rank
        return self.local_rank - max(0, self.trainers - first)

    @property
    def engines(self) -> int:
        """Number of engines in the job."""
        return (self.world_size - self.trainers) // self.tensor_parallel_size

    @property
    def engine(self) -> int:
        """Index of the engine that this rank belongs to."""
        assert not self.is_trainer
        return (self.rank - self.trainers) // self.tensor_parallel_size

    @property
    def is_leader(self) -> bool:
        """Whether this rank runs its engine, which also uses the GPUs of its other ranks."""
        return not self.is_trainer and (self.rank - self.trainers) % self.tensor_parallel_size == 0

    def engine_ranks(self, engine: int) -> range:
        """Return the ranks of an engine; the first is its leader."""
        first = self.trainers + engine * self.tensor_parallel_size
        return range(first, first + self.tensor_parallel_size)

    def store(self, *, timeout_s: float, scope: str = "launch") -> dist.Store:
        """Open a connection to the job's store: torchrun's own, or one that rank 0 hosts where torchrun has none.

        Each scope has its own keys.
        """
        store = dist.TCPStore(
            self.master_addr,
            self.master_port,
            is_master=self.rank == 0 and not self.agent_store,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
        return dist.PrefixStore(f"rollcast/{self.restart}/{scope}", store)


def without_torchrun(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` without torchrun's variables, which vLLM would take for its own ranks and store."""
    return {
        name: value
        for name, value in environ.items()
        if name not in TORCHRUN_NAMES and not name.startswith(TORCHRUN_PREFIXES)
    }


@contextmanager
def narrow_to_trainers(world: World) -> Iterator[None]:
    """Make torch.distributed, accelerate and the like see a torchrun job of trainer ranks only."""
    first_local = world.rank - world.local_rank
    before = dict(os.environ)
    os.environ["WORLD_SIZE"] = str(world.trainers)
    os.environ["LOCAL_WORLD_SIZE"] = str(min(world.local_world_size, world.trainers - first_local))
    try:
        yield
    finally:
        os.environ |= {name: before[name] for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE") if name in before}
