"""The gathering path: whole parameters, made for each sync and sent by rank 0 (every trainer rank).

It stands for systems that gather a sharded trainer's weights: rollcast itself sends each rank's shards.
"""

from latency.sharded_weights import RankWeights
from rollcast.comm import HeldParam, WeightSource
from rollcast.comm.transfer.gathering import GatheringSource
from rollcast.comm.transport.rendezvous import reachable_host
from rollcast.rollout import Job, PoolBroadcaster


class FromRank0(WeightSource):
    """Whole weights that every rank has: only rank 0 says so."""

    sends = True

    @property
    def statement(self) -> list[HeldParam]:
        """See `WeightSource.statement`."""
        statement = super().statement
        return statement if self.sends else [HeldParam(held.spec, ()) for held in statement]


class GatheredByRank0(FromRank0, GatheringSource):
    """Sharded weights that every rank gathers, one after the other."""


def gathering_broadcaster(job: Job, weights: RankWeights, *, version: int) -> PoolBroadcaster:
    """Return a broadcaster in place of `job.broadcaster`'s, which is closed, and served `version` last."""
    kind = GatheredByRank0 if weights.sharded_bytes() else FromRank0
    source = kind(weights.state, dtype=job.config.torch_dtype())
    source.sends = job.trainer_rank == 0
    agreement = job._agreement
    assert agreement is not None
    return PoolBroadcaster(
        source,
        job.pool,
        agreement,
        config=job.config,
        ranks=job.ranks,
        rank=job.trainer_rank,
        host=reachable_host(job.world.master_addr),
        name=f"gathered/{version}",
        version=version,
    )
