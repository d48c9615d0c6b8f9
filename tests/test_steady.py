"""Weights that stay where they are: looked for once, found again when they move."""

import pytest
import torch
from ranks import Ranks, WatchedSource, send
from sides import Sides, check_same_bytes, every_kind

from rollcast.comm import WeightSource
from rollcast.comm.buckets import LARGE_BYTES


def test_weights_that_stay_are_walked_once_and_found_again_when_they_move() -> None:
    weights = every_kind(seed=0) | {"big": torch.randn(LARGE_BYTES // 4)}
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    source = WatchedSource(contiguous)
    sides = Sides(source)
    with Ranks([0]) as ranks:
        for seed, walked in ((1, True), (2, False), (3, True), (4, False)):
            source.taken = []
            if seed == 3:
                contiguous["big"] = torch.empty_like(contiguous["big"])
                contiguous["split"].data = torch.empty_like(contiguous["split"])
            for name, value in (every_kind(seed=seed) | {"big": torch.randn(LARGE_BYTES // 4)}).items():
                contiguous[name].copy_(value)
            sides.sync(ranks)
            assert bool(source.taken) == walked
            check_same_bytes(sides.memories[0].tensors, contiguous)


def test_weights_of_another_shape_at_the_same_address_are_refused() -> None:
    weights = {"p": torch.randn(8, 4)}
    source = WeightSource(weights)
    sides = Sides(source)
    with Ranks([0]) as ranks:
        sides.sync(ranks)
        weights["p"].data = weights["p"].data[:4]
        with pytest.raises(ValueError, match=r"expected p \[8, 4\] float32, got p \[4, 4\] float32"):
            send(sides.broadcaster, ranks.senders)
