"""A 64-bit checksum of bytes, computed on their device in any order (both sides).

Each 8-byte word is mixed with its position by invertible steps (multiplications by odd numbers, shifts and xor, as in
Steele, Lea and Flood's SplitMix64, OOPSLA 2014) and the results are added modulo 2**64. One changed word always changes
the sum; words that change places do too, except with a chance of 2**-64.
"""

from functools import cache

import torch

WORD_BYTES = 8
# Words mixed at a time: on CPUs what fits their caches, on GPUs enough to make kernel launches cheap.
CHUNK_WORDS = 1 << 14
GPU_CHUNK_WORDS = 1 << 22
# SplitMix64's increment and its two multipliers, as signed integers.
POSITION = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)


def checksum(data: torch.Tensor) -> torch.Tensor:
    """Return the checksum of `data` (flat uint8, any device and alignment): a 0-d int64 tensor on its device."""
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    chunk_words = CHUNK_WORDS if data.device.type == "cpu" else GPU_CHUNK_WORDS
    for chunk, part in enumerate(data.split(chunk_words * WORD_BYTES)):
        words = _words(part)
        mixed = words + _positions(chunk_words, data.device)[: words.numel()]
        mixed += chunk * chunk_words * POSITION % (1 << 64) - (1 << 63)
        for shift, factor in ((30, FIRST), (27, SECOND)):
            mixed ^= (mixed >> shift) & ((1 << (64 - shift)) - 1)
            mixed *= factor
        total += (mixed ^ ((mixed >> 31) & ((1 << 33) - 1))).sum()
    return total


@cache
def _positions(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int64, device=device) * POSITION


def _words(part: torch.Tensor) -> torch.Tensor:
    """Return the bytes as int64 words, the last one padded with zeros."""
    if part.numel() % WORD_BYTES:
        part = torch.nn.functional.pad(part, (0, -part.numel() % WORD_BYTES))
    elif part.data_ptr() % WORD_BYTES or part.storage_offset() % WORD_BYTES:
        part = part.clone()
    return part.view(torch.int64)
