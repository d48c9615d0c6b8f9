"""Syncs of what several ranks hold make no full tensor on a trainer, and leave nothing behind."""

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch
from engines import Engines, Trainers
from landed import check_landed, check_ok
from shard_ranks import full_weights, shard_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rollcast.comm import Holding

pytestmark = pytest.mark.timeout(120)
MIB = 1 << 20
Start = Callable[..., Trainers]


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operation of this thread makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and (storage := each.untyped_storage())._cdata not in known:
                self.sizes.append(storage.nbytes())
        return result


@pytest.mark.parametrize("layout", ["as they are", "strided", "cast"])
def test_no_trainer_ever_has_more_than_two_buckets_besides_its_shards(start_shards: Start, layout: str) -> None:
    """Of 8 MiB, in buckets of 64 KiB: all that a rank allocates in three syncs, freed or not, is two buckets."""
    bucket_bytes = 64 << 10
    full = {f"p{index}": torch.randn(512, 512) for index in range(8)}
    states = shard_rows({name: each.double() if layout == "cast" else each for name, each in full.items()}, 4)
    if layout == "strided":
        states = [{name: strided(held) for name, held in state.items()} for state in states]
    engines = Engines(1, 2)
    trainers = start_shards(engines, states, dtype=torch.float32, bucket_bytes=bucket_bytes)
    counts = [Allocations() for _ in states]

    def sync(rank: int) -> None:
        with counts[rank]:
            for version in (1, 2, 3):
                trainers.broadcasters[rank].sync(version=version)

    with ThreadPoolExecutor(len(states)) as threads:
        list(threads.map(sync, range(len(states))))
    check_landed(engines, full)
    for count in counts:
        large = [size for size in count.sizes if size > 1024]
        assert sum(large) <= 2 * bucket_bytes, large
        assert bool(large) is (layout != "as they are")
        assert len(count.sizes) < 100


def strided(held: Holding) -> Holding:
    """The same in every other column of a larger tensor."""
    wide = torch.zeros(held.tensor.shape[0], 2 * held.tensor.shape[1], dtype=held.tensor.dtype)
    wide[:, ::2] = held.tensor
    return Holding(wide[:, ::2], held.shape, held.start)


@pytest.mark.parametrize("count", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_repeated_syncs_leave_memory_files_and_threads_as_they_were(start_shards: Start, count: int) -> None:
    """Moved, verified, or as they are."""
    engines, weights = Engines(1, 2), full_weights()
    states = shard_rows(weights, 3)
    trainers = start_shards(engines, states)
    used: dict[int, Resources] = {}
    for version in range(1, count + 1):
        if version % 10 == 0:
            # As an optimizer step that replaces memory.
            for name, held in states[1].items():
                states[1][name] = Holding(held.tensor.clone(), held.shape, held.start)
        check_ok(trainers.sync({"version": version, "verify": ("none", "checksum", "full")[version % 3]}))
        engines.seen.clear()
        if version in (count // 3, count):
            used[version] = Resources()
    check_landed(engines, weights)
    before, after = used[count // 3], used[count]
    assert (after.files, after.threads) == (before.files, before.threads)
    assert after.tensors <= before.tensors
    assert after.objects - before.objects < 500
    assert after.resident_bytes - before.resident_bytes < 4 * MIB


class Resources:
    """What this process uses."""

    def __init__(self) -> None:
        gc.collect()
        process = psutil.Process()
        self.files, self.threads = process.num_fds(), process.num_threads()
        self.resident_bytes = process.memory_info().rss
        objects = gc.get_objects()
        self.objects = len(objects)
        self.tensors = sum(issubclass(type(each), torch.Tensor) for each in objects)
