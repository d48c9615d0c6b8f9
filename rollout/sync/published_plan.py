"""The transfer plan, as trainer rank 0 publishes it in the groups' store and all ranks read it (trainer ranks)."""

import base64
from collections.abc import Mapping, Sequence

import msgspec
from torch import distributed as dist

from rollcast.comm import Holders, TransferPlan, build_transfer, statement_from_text
from rollcast.rollout.config import RolloutConfig
from rollcast.rollout.landing.plan import LandingPlan

# torch's store closes the connection of a client that sends it more than 8 MiB at a time.
PART_BYTES = 4 << 20


class Blueprint(msgspec.Struct, frozen=True):
    """Everything, besides settings, that each rank makes the same `TransferPlan` of."""

    statements: Sequence[str]
    """What each trainer rank holds (`statement_to_text`), in rank order."""
    landings: Mapping[str, bytes]
    """`LandingPlan.to_bytes()` by digest, every different one once."""
    workers: Sequence[str]
    """Digest of each worker's landing plan, engine by engine."""
    digest: str = ""
    """Digest of the transfer plan."""

    def build(self, holders: Holders, config: RolloutConfig) -> TransferPlan:
        """Return the transfer plan; `holders` is what `merge_statements` makes of the statements.

        Raises `ValueError` for a parameter that no worker keeps.
        """
        return build_transfer(
            holders,
            {digest: LandingPlan.from_bytes(plan).moves for digest, plan in self.landings.items()},
            self.workers,
            bucket_bytes=config.bucket_bytes,
            paired=config.colocate,
        )


def merge_statements(texts: Sequence[str]) -> Holders:
    """Return who holds what. Raises `ValueError` naming a parameter about which ranks disagree, or that has a hole."""
    return Holders.of(list(map(statement_from_text, texts)))


def publish_plan(blueprint: Blueprint, store: dist.Store, holders: Holders, config: RolloutConfig) -> int:
    """Put the blueprint, with its plan's digest, into the groups' store (rank 0). Return the number of its parts."""
    blueprint = msgspec.structs.replace(blueprint, digest=blueprint.build(holders, config).digest)
    text = base64.b64encode(msgspec.msgpack.encode(blueprint)).decode()
    starts = range(0, len(text), PART_BYTES)
    for part, start in enumerate(starts):
        store.set(f"blueprint/{part}", text[start : start + PART_BYTES])
    return len(starts)


def read_plan(store: dist.Store, parts: int, config: RolloutConfig, *, rank: int) -> tuple[TransferPlan, Holders]:
    """Return the plan of the blueprint that rank 0 has published, and who holds what.

    Raises `ValueError` if this rank makes another plan of it.
    """
    text = b"".join(store.get(f"blueprint/{part}") for part in range(parts))
    blueprint = msgspec.msgpack.decode(base64.b64decode(text), type=Blueprint)
    holders = merge_statements(blueprint.statements)
    plan = blueprint.build(holders, config)
    if plan.digest != blueprint.digest:
        raise ValueError(f"trainer rank {rank} made another transfer plan than rank 0: run one version of rollcast")
    return plan, holders
