"""Layouts of trainers and engines that the latency benchmark compares, and their text form (every process)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

HOLDS = ("replicated", "fsdp2-bf16", "fsdp2-fp32", "hsdp", "tp", "ep")
LEAST_TRAINERS = {"hsdp": 4}
PATTERN = re.compile(
    r"(?P<trainers>\d+)(x(?P<holds>[a-z0-9-]+))?"
    r":((?P<engines>\d+)|((?P<many>\d+)x)?(?P<kind>tp|ep)(?P<size>\d+))"
    r"(?P<colocated>@shared)?"
)
GRAMMAR = "TRAINERS[xHOLDS]:ENGINES, :tpN, :epN or :ENGINESxtpN, and @shared at the end for engines on trainers' GPUs"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks train, what each of them holds, and how the engines are made."""

    trainers: int
    holds: str = "replicated"
    """One of `HOLDS`."""
    engines: int
    tensor_parallel_size: int = 1
    expert_parallel: bool = False
    colocated: bool = False
    """Worker i is on the GPU of trainer rank i."""

    def __post_init__(self) -> None:
        if self.holds not in HOLDS:
            raise ValueError(f"{self}: unknown {self.holds!r}, expected one of {', '.join(HOLDS)}")
        if not (self.trainers and self.engines and self.tensor_parallel_size):
            raise ValueError(f"{self}: all numbers must be positive")
        if self.trainers == 1 and self.holds != "replicated":
            raise ValueError(f"{self}: a single trainer has no shards: write 1:{self.served}")
        if (self.trainers % 2 and self.holds == "hsdp") or self.trainers < LEAST_TRAINERS.get(self.holds, 1):
            raise ValueError(f"{self}: hsdp is two replicas of shards: it needs 4, 6, 8, ... trainers")
        if self.colocated and self.trainers != self.workers:
            raise ValueError(f"{self}: @shared needs as many trainers as workers, got {self.workers} workers")

    def __str__(self) -> str:
        holds = "" if self.trainers == 1 else f"x{self.holds}"
        return f"{self.trainers}{holds}:{self.served}{'@shared' if self.colocated else ''}"

    @property
    def served(self) -> str:
        """The engines, as in the text form."""
        if self.tensor_parallel_size == 1:
            return str(self.engines)
        many = "" if self.engines == 1 else f"{self.engines}x"
        return f"{many}{'ep' if self.expert_parallel else 'tp'}{self.tensor_parallel_size}"

    @property
    def workers(self) -> int:
        """Number of workers of all engines."""
        return self.engines * self.tensor_parallel_size

    @property
    def gpus(self) -> int:
        """Number of GPUs that it needs."""
        return self.trainers if self.colocated else self.trainers + self.workers

    @property
    def needs_experts(self) -> bool:
        """Whether it is for mixture-of-experts models only."""
        return self.expert_parallel or self.holds == "ep"

    @property
    def placement(self) -> "Layout":
        """The layout, whatever the trainers hold: layouts of equal placements can share a job."""
        return replace(self, holds="replicated")


def parse_layout(text: str) -> Layout:
    """Return the layout of a text such as "2xfsdp2-fp32:tp2@shared". Raises `ValueError` for any other text."""
    match = PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"cannot read the layout {text.strip()!r}: write {GRAMMAR}")
    return Layout(
        trainers=int(match["trainers"]),
        holds=match["holds"] or "replicated",
        engines=int(match["engines"] or match["many"] or 1),
        tensor_parallel_size=int(match["size"] or 1),
        expert_parallel=match["kind"] == "ep",
        colocated=match["colocated"] is not None,
    )


def parse_layouts(text: str) -> list[Layout]:
    """Return the layouts of a comma-separated text."""
    return [parse_layout(each) for each in text.split(",")]


LAYOUTS = parse_layouts(
    "1:1,1:2,1:3,2xreplicated:2,2xfsdp2-bf16:2,2xfsdp2-fp32:2,3xfsdp2-bf16:1,2xfsdp2-bf16:tp2,2xfsdp2-fp32:tp2,2xtp:tp2,"
    "4xhsdp:2,4xhsdp:4,2xep:tp2,2xep:ep2,2xfsdp2-bf16:ep2,"
    "1:1@shared,2xreplicated:2@shared,2xfsdp2-bf16:2@shared,2xfsdp2-fp32:2@shared,2xtp:tp2@shared,"
    "2xfsdp2-bf16:tp2@shared,2xfsdp2-fp32:tp2@shared,4xhsdp:4@shared,2xep:ep2@shared,2xfsdp2-bf16:ep2@shared"
)
"""What is measured where the machine has the GPUs for it."""


def fitting(layouts: Sequence[Layout], *, gpus: int | None) -> list[Layout]:
    """Return the layouts for which a machine has enough GPUs; `None`: all, as on a CPU."""
    return [layout for layout in layouts if gpus is None or layout.gpus <= gpus]


def by_placement(layouts: Sequence[Layout]) -> list[list[Layout]]:
    """Return the layouts in groups of equal placement, in the order in which these come first."""
    groups: dict[Layout, list[Layout]] = {}
    for layout in dict.fromkeys(layouts):
        groups.setdefault(layout.placement, []).append(layout)
    return list(groups.values())
