"""Ranks of a job that are simulated in turn, in one process."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def rank_of(world: int, rank: int) -> Iterator[None]:
    """Be a rank with torch's "fake" process group: splitting a tensor takes no communication."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    # What torch caches belongs to another rank.
    _clear_sharding_prop_cache()
    try:
        yield
    finally:
        dist.destroy_process_group()
