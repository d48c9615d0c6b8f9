"""Weights that stay where they are: looked for once, found again when they move."""

import pytest
import torch
from ranks import LONG_S, Ranks, WatchedSource, receive, send
from sides import Sides, check_same_bytes, every_kind

from rollcast.comm import WeightSource
from rollcast.comm.plan.buckets import LARGE_BYTES
from rollcast.comm.transfer.source import MANY


@pytest.fixture(params=[0, MANY], ids=["many", "few"])
def many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there are so many tensors that each is looked at when its turn comes."""
    monkeypatch.setattr("rollcast.comm.transfer.source.MANY", request.param)
    return not request.param


def test_weights_that_stay_are_walked_once_and_found_again_when_they_move(many: bool) -> None:
    weights = every_kind(seed=0) | {"big": torch.randn(LARGE_BYTES // 4)}
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    source = WatchedSource(contiguous)
    sides = Sides(source)
    with Ranks([0]) as ranks:
        for seed, walked in (
            (1, True),
            (2, False),
            (3, True),
            (4, False),
            (5, True),
            (6, False),
            (7, True),
            (8, False),
        ):
            source.taken = []
            if seed == 3:
                contiguous["big"] = torch.empty_like(contiguous["big"])
                contiguous["split"].data = torch.empty_like(contiguous["split"])
            if seed in (5, 7):
                # In the first bucket, in the last one.
                moved = contiguous["float32" if seed == 5 else "big"]
                moved.data = torch.empty_like(moved)
            for name, value in (every_kind(seed=seed) | {"big": torch.randn(LARGE_BYTES // 4)}).items():
                contiguous[name].copy_(value)
            sides.sync(ranks)
            assert bool(source.taken) == walked
            check_same_bytes(sides.memories[0].tensors, contiguous)


def test_weights_that_change_their_dtype_on_the_way_fail_one_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollcast.comm.transfer.source.MANY", 0)
    weights = {name: torch.randn(300) for name in "abcd"}
    sides = Sides(WeightSource(weights, dtype=torch.bfloat16))
    with Ranks([0]) as ranks:
        sides.sync(ranks)
        weights["d"].data = weights["d"].data.bfloat16()
        receiving = ranks.start(receive, sides.receivers[0], ranks.workers[0])
        with pytest.raises(ValueError, match="weights have changed their dtype or device"):
            send(sides.broadcaster, ranks.senders)
        ranks.senders[0].close()
        with pytest.raises(RuntimeError):
            receiving.result(LONG_S)
    with Ranks([0]) as ranks:
        sides.sync(ranks)
        check_same_bytes(sides.memories[0].tensors, {name: tensor.bfloat16() for name, tensor in weights.items()})


def test_two_names_of_one_memory_are_both_looked_at(many: bool) -> None:
    one = torch.randn(300)
    weights = {"a": one, "b": torch.randn(300), "c": one.view(300)}
    source = WeightSource(weights)
    sides = Sides(source)
    with Ranks([0]) as ranks:
        for _ in range(2):
            sides.sync(ranks)
        weights["a"].data = torch.randn(300)
        with pytest.raises(ValueError, match=r"the trainer.s weights changed since the broadcaster was made: .*c"):
            send(sides.broadcaster, ranks.senders)


def test_weights_of_another_shape_at_the_same_address_are_refused(many: bool) -> None:
    weights = {"p": torch.randn(8, 4)}
    source = WeightSource(weights)
    sides = Sides(source)
    with Ranks([0]) as ranks:
        sides.sync(ranks)
        weights["p"].data = weights["p"].data[:4]
        with pytest.raises(ValueError, match=r"expected p \[8, 4\] float32, got p \[4, 4\] float32"):
            send(sides.broadcaster, ranks.senders)
