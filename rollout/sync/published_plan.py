"""The transfer plan, as trainer rank 0 publishes it in the groups' store and all ranks read it (trainer ranks)."""

import base64
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from torch import distributed as dist

from rollcast.comm import (
    Holders,
    Kept,
    TransferPlan,
    WeightSource,
    build_transfer,
    statement_from_text,
    statement_to_text,
)
from rollcast.rollout.config import RolloutConfig
from rollcast.rollout.landing.plan import LandingPlan

# torch's store closes the connection of a client that sends it more than 8 MiB at a time.
PART_BYTES = 4 << 20
# Names that a message lists at most.
MAX_NAMES = 8
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


logger = logging.getLogger(__name__)


class Blueprint(msgspec.Struct, frozen=True):
    """Everything, besides settings, that each rank makes the same `TransferPlan` of."""

    statements: Sequence[str]
    """What each trainer rank holds (`state`), in rank order."""
    landings: Mapping[str, bytes]
    """`LandingPlan.to_bytes()` by digest, every different one once."""
    workers: Sequence[str]
    """Digest of each worker's landing plan, engine by engine."""
    digest: str = ""
    """Digest of the transfer plan."""

    def build(self, holders: Holders, config: RolloutConfig) -> TransferPlan:
        """Return the transfer plan; `holders` is that of the statements."""
        return build_transfer(
            holders,
            {digest: LandingPlan.from_bytes(plan).moves for digest, plan in self.landings.items()},
            self.workers,
            bucket_bytes=config.bucket_bytes,
            paired=config.colocate,
        )


def state(source: WeightSource) -> str:
    """Return what this rank holds, and what it does not send, as text."""
    return f"{statement_to_text(source.statement)} {base64.b64encode(source.kept.to_bytes()).decode()}"


@dataclass(frozen=True)
class Statements:
    """What all trainer ranks have stated."""

    texts: Sequence[str]
    """Of each rank (`state`), in rank order."""
    holders: Holders
    """Who holds what."""
    kept: Kept
    """What the engines keep."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Statements":
        """Merge the ranks' statements.

        Raises `ValueError` naming a parameter about which ranks disagree, or of which nobody holds some elements.
        """
        pairs = [text.split(" ") for text in texts]
        holders = Holders.of([statement_from_text(held) for held, _ in pairs])
        kept = [Kept.from_bytes(base64.b64decode(kept)) for _, kept in pairs]
        return cls(texts, holders, Kept.merged(kept, holders.manifest))


def publish_plan(blueprint: Blueprint, store: dist.Store, holders: Holders, config: RolloutConfig) -> int:
    """Put the blueprint, with its plan's digest, into the groups' store (rank 0). Return the number of its parts."""
    plan = blueprint.build(holders, config)
    if skipped := plan.skipped:
        logger.warning("not sent, because vLLM's loader skips it: %s", summary([spec.name for spec in skipped]))
    blueprint = msgspec.structs.replace(blueprint, digest=plan.digest)
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
    holders = Statements.of(blueprint.statements).holders
    plan = blueprint.build(holders, config)
    if plan.digest != blueprint.digest:
        raise ValueError(f"trainer rank {rank} made another transfer plan than rank 0: run one version of rollcast")
    return plan, holders


def summary(names: Sequence[str]) -> str:
    """Return the names as a short text, those that differ in numbers alone as one."""
    kinds = Counter(NUMBER.sub("*", name) for name in names)
    listed = [kind if count == 1 else f"{kind} ({count})" for kind, count in kinds.most_common(MAX_NAMES)]
    return ", ".join(listed) + (f" and {len(kinds) - MAX_NAMES} more" if len(kinds) > MAX_NAMES else "")
