"""The hash of bytes: against Python's own integers, and against every way to damage a sync."""

import random
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from ranks import LONG_S, Memory, Ranks, Tapped, raw, receive, send
from sides import Sides, large_source

from rollcast.comm import Deadline, PhaseTimer, VerifyError, WeightSource, whole_moves
from rollcast.comm.device.checksum import CHUNK_WORDS, WORD_BYTES, _words, checksum

CHUNK_BYTES = CHUNK_WORDS * WORD_BYTES
LENGTHS = [*range(18), 31, 64, 100, 1000, 1023, 4099]


def random_bytes(count: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def by_hand(data: bytes) -> int:
    """SplitMix64's finaliser on word + position * golden ratio - 2**63, in Python's integers; a signed sum."""
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    total = 0
    for position, word in enumerate(words):
        z = (word + position * 0x9E3779B97F4A7C15 + 2**63) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        total += z ^ (z >> 31)
    return (total + 2**63) % 2**64 - 2**63


def value(data: torch.Tensor) -> int:
    result = checksum(data)
    assert (result.shape, result.dtype, result.device) == ((), torch.int64, data.device)
    return int(result)


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_pythons_integers(length: int) -> None:
    for seed in range(4):
        data = random_bytes(length, seed=seed)
        assert value(data) == by_hand(bytes(data.tolist()))
    assert value(torch.full((length,), 255, dtype=torch.uint8)) == by_hand(b"\xff" * length)


def test_later_chunks_go_on_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of 4 words the hash is what it is in one."""
    data = random_bytes(1000)
    expected = value(data)
    monkeypatch.setattr("rollcast.comm.device.checksum.CHUNK_WORDS", 4)
    assert value(data) == expected == by_hand(bytes(data.tolist()))


@pytest.mark.parametrize("length", [1, 7, 8, 16, 100])
@pytest.mark.parametrize("base", range(8))
def test_any_alignment_gives_the_same(length: int, base: int) -> None:
    """Of the storage, and of the view in it: words must be aligned on a GPU, and their offset whole in torch."""
    data = random_bytes(length)
    room = torch.frombuffer(bytearray(length + 32), dtype=torch.uint8, offset=base)
    for start in range(17):
        view = room[start : start + length].copy_(data)
        assert value(view) == value(data)
        assert torch.equal(view, data)
        assert _words(view).data_ptr() % WORD_BYTES == 0


@pytest.mark.parametrize("length", [1, 8, 21, 64, 100])
def test_every_flipped_bit_of_a_small_input_shows(length: int) -> None:
    data = random_bytes(length)
    before = value(data)
    for byte in range(length):
        for bit in range(8):
            data[byte] ^= 1 << bit
            assert value(data) != before, (byte, bit)
            data[byte] ^= 1 << bit
    assert value(data) == before


@pytest.mark.parametrize("length", [2 * CHUNK_BYTES + 12345, 2 * CHUNK_BYTES, CHUNK_BYTES + 1])
def test_flipped_bytes_of_a_large_input_show(length: int) -> None:
    data, rng = random_bytes(length), random.Random(length)
    before = value(data)
    edges = [0, CHUNK_BYTES - 1, CHUNK_BYTES, min(2 * CHUNK_BYTES, length - 1), length - 1]
    for byte in [*edges, *(rng.randrange(length) for _ in range(4))]:
        data[byte] ^= 1
        assert value(data) != before, byte
        data[byte] ^= 1


def test_words_that_change_places_show() -> None:
    words = random_bytes(8 * 20).view(torch.int64)
    before = value(words.view(torch.uint8))
    for one in range(20):
        for other in range(one):
            words[[one, other]] = words[[other, one]]
            assert value(words.view(torch.uint8)) != before
            words[[one, other]] = words[[other, one]]


def test_words_and_chunks_that_change_places_in_a_large_input_show() -> None:
    words = random_bytes(2 * CHUNK_BYTES).view(torch.int64)
    before = value(words.view(torch.uint8))
    for one, other in ((0, CHUNK_WORDS), (5, CHUNK_WORDS + 5), (1, 2 * CHUNK_WORDS - 1)):
        words[[one, other]] = words[[other, one]]
        assert value(words.view(torch.uint8)) != before
        words[[one, other]] = words[[other, one]]
    assert value(words.view(2, -1).flip(0).flatten().view(torch.uint8)) != before


def test_zeros_of_every_length_of_words_differ() -> None:
    assert len({value(torch.zeros(8 * count, dtype=torch.uint8)) for count in range(200)}) == 200


# A worker with every sort of target; three buckets or more of 1024 bytes.


def mixed_sides() -> Sides:
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
    """Of one lane with one worker; for syncs that both sides finish."""
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
    assert f", {name}, arrived damaged" in str(error)
    assert memory.events[-1] == "abandon"
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


def test_without_checksums_nothing_is_noticed_but_confirming_finds_it(ranks: Ranks) -> None:
    sides, memory, error = damaged(ranks, (0, 0, 5), checksums=False)
    assert error is None
    assert memory.events[-1] == "commit"
    assert "in memory is not what the trainer holds" in str(changed(sides))
    assert memory.events[-1] == "abandon"


def damaged(ranks: Ranks, at: tuple[int, int, int], *, checksums: bool) -> tuple[Sides, Memory, BaseException | None]:
    """A sync in which one bit flips on the way."""
    sides = mixed_sides()
    sent = ranks.start(send, sides.broadcaster, ranks.senders, checksums=checksums)
    received = ranks.start(receive, sides.receivers[0], Tapped(ranks.workers[0], at), checksums=checksums)
    error = received.exception(LONG_S)
    sent.result(LONG_S)
    return sides, sides.memories[0], error


def synced(ranks: Ranks) -> tuple[Sides, Memory]:
    sides = mixed_sides()
    ranks.sync([sides.broadcaster], sides.receivers, checksums=True)
    ranks.confirm([sides.broadcaster], sides.receivers)
    assert sides.memories[0].events == ["begin", "finish 3", "commit"]
    return sides, sides.memories[0]


def changed(sides: Sides) -> VerifyError:
    with Ranks([0]) as ranks:
        sent = ranks.start(send, sides.broadcaster, ranks.senders)
        with pytest.raises(VerifyError) as caught:
            sides.receivers[0].confirm(ranks.workers[0], deadline=Deadline(LONG_S), timer=PhaseTimer())
        ranks.workers[0].close()
        sent.exception(LONG_S)
    return caught.value


@pytest.mark.parametrize("target", ["in_place", "strided", "cast", "split", "staged"])
@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
def test_confirming_finds_a_byte_that_changed_after_the_sync(ranks: Ranks, target: str, place: float) -> None:
    sides, memory = synced(ranks)
    tensor = memory.processed[3][target] if target == "staged" else memory.tensors[target]
    data = tensor.untyped_storage()
    data[round(place * (len(data) - 1))] ^= 1
    error = changed(sides)
    assert ("stage 3 is not" if target == "staged" else f"{target}[") in str(error)
    assert memory.events[-1] == "abandon"


def test_confirming_tells_the_trainers_new_values_from_the_old(ranks: Ranks) -> None:
    source = large_source(3)
    sides = Sides(source)
    ranks.sync([sides.broadcaster], sides.receivers)
    for _, tensor in source:
        tensor.neg_()
    assert str(changed(sides)) == "p0[0:250] in memory is not what the trainer holds"


def test_confirming_compares_bits_not_numbers(ranks: Ranks) -> None:
    """Zero is not minus zero, and a NaN is equal to itself."""
    values = torch.tensor([0.0, float("nan"), 1.0])
    sides = Sides(WeightSource({"a": values}))
    ranks.sync([sides.broadcaster], sides.receivers)
    ranks.confirm([sides.broadcaster], sides.receivers)
    sides.memories[0].tensors["a"][0] = -0.0
    assert torch.equal(raw(sides.memories[0].tensors["a"])[:4], torch.tensor([0, 0, 0, 128], dtype=torch.uint8))
    assert "a[0:3]" in str(changed(sides))
