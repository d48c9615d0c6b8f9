"""A receiver notices every damaged byte: by checksums on the way, by `confirm` in memory afterwards."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from moves import whole_moves
from ranks import LONG_S, Memory, Ranks, Tapped, raw, receive, send
from sides import Sides, full_tensors, large_source

from rollcast.comm import Deadline, PhaseTimer, VerifyError, WeightSource


def mixed_sides() -> Sides:
    """Return a worker with every kind of target; its lane has at least three buckets."""
    torch.manual_seed(0)
    weights = {name: torch.randn(20, 10).bfloat16() for name in ("in_place", "strided", "cast", "staged", "split")}
    source = WeightSource({**weights, "split": torch.randn(40, 20).bfloat16()})
    moves = {move.target: move for move in whole_moves(source.manifest)}
    strided = replace(moves["strided"].region, stride=(1, 20))
    moves["strided"] = replace(moves["strided"], region=strided)
    moves["cast"] = replace(moves["cast"], region=replace(moves["cast"].region, dtype=torch.float32))
    moves["staged"] = replace(moves["staged"], stage=3)
    return Sides(source, moves=tuple(moves.values()))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """The groups of one lane with one worker, for syncs that both sides finish."""
    with Ranks([0]) as ranks:
        yield ranks


MESSAGES = [
    (turn, index, str(message), message.nbytes)
    for turn, bucket in enumerate(mixed_sides().plan.lanes[0].buckets)
    for index, message in enumerate(bucket.messages)
]


@pytest.mark.parametrize(("turn", "index", "name", "nbytes"), MESSAGES, ids=[name for _, _, name, _ in MESSAGES])
@pytest.mark.parametrize("end", ["first", "last"])
def test_a_bit_that_flips_on_the_way_fails_the_sync(
    ranks: Ranks, turn: int, index: int, name: str, nbytes: int, end: str
) -> None:
    byte = 0 if end == "first" else nbytes - 1
    sides, memory, error = damaged(ranks, (turn, index, byte), checksums=True)
    assert isinstance(error, VerifyError)
    assert re.fullmatch(rf"message \d+ of lane 0 \({re.escape(name)}\): checksum mismatch", str(error))
    assert memory.events[-1] == "abort"
    assert "commit" not in memory.events
    assert len(sides.plan.lanes[0].buckets) >= 3


def test_the_first_of_two_damaged_messages_is_named(ranks: Ranks) -> None:
    """The last bucket and the second are damaged; `Tapped` wraps any group."""
    sides = mixed_sides()
    first = next(name for turn, _, name, _ in MESSAGES if turn == 1)
    sent = ranks.start(send, sides.broadcaster, ranks.senders, checksums=True)
    with pytest.raises(VerifyError, match=re.escape(first)):
        receive(sides.receivers[0], Tapped(Tapped(ranks.workers[0], (2, 0, 1)), (1, 0, 1)), checksums=True)
    sent.result(LONG_S)


def test_without_checksums_only_verifying_detects_it(ranks: Ranks) -> None:
    sides, memory, error = damaged(ranks, (0, 0, 5), checksums=False)
    assert error is None
    assert memory.events[-1] == "commit"
    assert "in memory is not what the trainer holds" in str(changed(sides))
    assert memory.events[-1] == "abort"


def damaged(ranks: Ranks, at: tuple[int, int, int], *, checksums: bool) -> tuple[Sides, Memory, BaseException | None]:
    """Run a sync in which one bit flips on the way."""
    sides = mixed_sides()
    sent = ranks.start(send, sides.broadcaster, ranks.senders, checksums=checksums)
    received = ranks.start(receive, sides.receivers[0], Tapped(ranks.workers[0], at), checksums=checksums)
    error = received.exception(LONG_S)
    sent.result(LONG_S)
    return sides, sides.memories[0], error


def synced(ranks: Ranks) -> tuple[Sides, Memory]:
    sides = mixed_sides()
    ranks.sync([sides.broadcaster], sides.receivers, checksums=True)
    ranks.verify([sides.broadcaster], sides.receivers)
    assert sides.memories[0].events == ["begin", "finish 3", "commit"]
    return sides, sides.memories[0]


def changed(sides: Sides) -> VerifyError:
    with Ranks([0]) as ranks:
        sent = ranks.start(send, sides.broadcaster, ranks.senders)
        with pytest.raises(VerifyError) as caught:
            sides.receivers[0].verify(ranks.lanes_of[0], deadline=Deadline(LONG_S), timer=PhaseTimer())
        ranks.workers[0].close()
        sent.exception(LONG_S)
    return caught.value


@pytest.mark.parametrize("target", ["in_place", "strided", "cast", "split", "staged"])
@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
def test_verifying_detects_a_byte_that_changed_after_the_sync(ranks: Ranks, target: str, place: float) -> None:
    sides, memory = synced(ranks)
    tensor = memory.processed[3][target] if target == "staged" else memory.tensors[target]
    data = tensor.untyped_storage()
    data[round(place * (len(data) - 1))] ^= 1
    error = changed(sides)
    assert ("stage 3 is not" if target == "staged" else f"{target}[") in str(error)
    assert memory.events[-1] == "abort"


def test_verifying_detects_new_values_at_the_trainer(ranks: Ranks) -> None:
    source = large_source(3)
    sides = Sides(source)
    ranks.sync([sides.broadcaster], sides.receivers)
    for _, tensor in full_tensors(source):
        tensor.neg_()
    assert str(changed(sides)) == "p0[0:250] in memory is not what the trainer holds"


def test_verifying_compares_bits_not_numbers(ranks: Ranks) -> None:
    """Zero is not minus zero, and a NaN is equal to itself."""
    values = torch.tensor([0.0, float("nan"), 1.0])
    sides = Sides(WeightSource({"a": values}))
    ranks.sync([sides.broadcaster], sides.receivers)
    ranks.verify([sides.broadcaster], sides.receivers)
    sides.memories[0].tensors["a"][0] = -0.0
    assert torch.equal(raw(sides.memories[0].tensors["a"])[:4], torch.tensor([0, 0, 0, 128], dtype=torch.uint8))
    assert "a[0:3]" in str(changed(sides))
