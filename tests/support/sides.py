"""Both sides of a sync of whole parameters, and the values that workers must end with."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from moves import whole_moves
from ranks import CPU, Memory, Ranks, Weights, receiver_of, same_bytes

from rollcast.comm import Holders, Manifest, Move, ParamSpec, WeightBroadcaster, WeightSource, build_transfer

BUCKET_BYTES = 1024


class Sides:
    """The broadcaster and receivers of one lane, whose workers all keep the same."""

    def __init__(
        self,
        source: WeightSource,
        *,
        workers: int = 1,
        moves: Sequence[Move] = (),
        refuse: str = "",
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        moves = moves or whole_moves(source.manifest)
        self.plan = build_transfer(
            Holders.replicated(source.manifest, 1), {"w": moves}, ["w"] * workers, bucket_bytes=bucket_bytes
        )
        self.broadcaster = WeightBroadcaster(source, self.plan, device=CPU)
        self.memories = [memory_of(source.manifest, moves, refuse=refuse) for _ in range(workers)]
        self.receivers = {w: receiver_of(self.plan.lanes, memory) for w, memory in enumerate(self.memories)}

    def sync(self, ranks: Ranks) -> None:
        ranks.sync([self.broadcaster], self.receivers)


def full_tensors(source: WeightSource) -> Iterator[tuple[ParamSpec, torch.Tensor]]:
    """Yield every parameter's spec and full tensor, which this rank holds."""
    for param, (tensor,) in source.gather(range(len(source.manifest.specs))):
        yield source.manifest.specs[param], tensor


def every_kind(*, seed: int) -> Weights:
    """Make random weights: contiguous, strided, split, scalar, zero-element; every sort of dtype."""
    torch.manual_seed(seed)
    return {
        "float32": torch.randn(17, 9),
        "float16": torch.randn(100).half(),
        "transposed": torch.randn(7, 21).t(),
        "strided": torch.randn(30, 4)[::3, 1:],
        "split": torch.randn(5000),
        "split strided": torch.randn(60, 50).t(),
        "scalar": torch.randn(()),
        "empty": torch.empty(0, 4),
        "fp8": torch.randn(33).to(torch.float8_e4m3fn),
        "int8": torch.randint(-128, 128, (3, 11), dtype=torch.int8),
        "int64": torch.randint(-(2**62), 2**62, (5,)),
        "bool": torch.rand(2000) < 0.5,
    }


def large_source(count: int = 800) -> WeightSource:
    return WeightSource({f"p{index}": torch.randn(250) for index in range(count)})


def memory_of(manifest: Manifest, moves: Sequence[Move], *, refuse: str = "") -> Memory:
    """Make a memory whose targets, all of which the moves write, start with ones in them."""
    live: Weights = {spec.name: torch.ones(spec.shape, dtype=spec.dtype) for spec in manifest.specs if not spec.numel}
    stages: dict[int, Weights] = {}
    for move in moves:
        tensors = live if move.stage is None else stages.setdefault(move.stage, {})
        tensors[move.target] = torch.ones(move.region.shape, dtype=move.region.dtype)
    return Memory(live, stages, refuse=refuse)


def widened(manifest: Manifest) -> tuple[Move, ...]:
    """Return the moves of a worker that keeps every number as float64."""
    return tuple(replace(move, region=replace(move.region, dtype=torch.float64)) for move in whole_moves(manifest))


def cast(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """Return what workers must receive: floating-point tensors in the wire dtype, the others as they are."""
    floating = {name for name, t in weights.items() if t.is_floating_point() and t.dtype.itemsize > 1}
    return {name: t.to(dtype) if dtype and name in floating else t for name, t in weights.items()}


def check_same_bytes(got: Weights, expected: Weights) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert same_bytes(got[name], tensor), name


@contextmanager
def within(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    yield
    assert time.monotonic() < end
