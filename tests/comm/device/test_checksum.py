"""The checksum of bytes: against Python's own integers, and against every way to damage the bytes."""

import random

import pytest
import torch

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
    """The checksum in chunks of 4 words is the one of a single chunk."""
    data = random_bytes(1000)
    expected = value(data)
    monkeypatch.setattr("rollcast.comm.device.checksum.CHUNK_WORDS", 4)
    assert value(data) == expected == by_hand(bytes(data.tolist()))


@pytest.mark.parametrize("length", [1, 7, 8, 16, 100])
@pytest.mark.parametrize("base", range(8))
def test_any_alignment_gives_the_same(length: int, base: int) -> None:
    """Alignment of the storage and of the view in it: GPUs need aligned words, torch a whole offset."""
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
