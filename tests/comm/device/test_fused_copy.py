"""Fused copies: every byte once, at every size around a chunk and a 16-byte word."""

import pytest
import torch

from rollcast.comm.device.fused_copy import CHUNK_BYTES, FusedCopy, chunks


@pytest.mark.parametrize("nbytes", [1, 16, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5])
def test_chunks_cover_every_copy_once_in_order(nbytes: int) -> None:
    copies = [(1 << 40, 1 << 50, nbytes), (1 << 41, 1 << 51, 7)]
    rows = chunks(copies)
    assert (rows.dtype, rows.shape[1]) == (torch.int64, 3)
    assert int(rows[:, 2].min()) > 0 and int(rows[:, 2].max()) <= CHUNK_BYTES
    got = [(target + at, source + at) for target, source, size in rows.tolist() for at in range(size)]
    assert got == [(target + at, source + at) for target, source, size in copies for at in range(size)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_many_copies_at_once_equal_torchs_own(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    sizes = (1, 15, 16, 17, 65_535, 65_536, 65_537, 1_000_003)
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8, device=device) for size in sizes]
    targets = [torch.zeros_like(source) for source in sources]
    copy = FusedCopy(targets, sources)
    for _ in range(2):
        copy.run()
        assert all(map(torch.equal, targets, sources))
        for source in sources:
            source.add_(1)
    FusedCopy([], []).run()
