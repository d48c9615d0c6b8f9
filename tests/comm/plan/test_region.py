"""Regions: the same part of any tensor of the same layout, with torch's own slices as the reference."""

from collections.abc import Callable

import pytest
import torch

from rollcast.comm import Region

Part = Callable[[torch.Tensor], torch.Tensor]

# Parts of a [4, 6] tensor.
PARTS: dict[str, Part] = {
    "all": lambda t: t,
    "rows": lambda t: t[1:3],
    "columns": lambda t: t[:, 2:5],
    "block": lambda t: t[1:, 3:],
    "step": lambda t: t[::2, 1::3],
    "row": lambda t: t[2],
    "column": lambda t: t[:, 5],
    "last element": lambda t: t[3, 5],
    "transposed": lambda t: t.t(),
    "transposed part": lambda t: t.t()[2:4, 1:],
    "chunk": lambda t: t.chunk(3, dim=1)[1],
    "narrow": lambda t: t.narrow(0, 2, 2).narrow(1, 1, 4),
    "diagonal": lambda t: t.diagonal(),
    "expanded": lambda t: t[1:2].expand(5, 6),
    "expanded scalar": lambda t: t[2, 2].expand(3),
    "reshaped": lambda t: t.view(2, 2, 6)[:, 1],
    "permuted": lambda t: t.view(2, 2, 6).permute(2, 0, 1),
    "unsqueezed": lambda t: t[:, None, 1:2],
    "no rows": lambda t: t[2:2],
    "no columns": lambda t: t[:, 6:],
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_region_of_one_tensor_is_the_same_part_of_another(part: Part) -> None:
    one, other = torch.randn(4, 6), torch.randn(4, 6)
    region = Region.of(part(one))
    assert torch.equal(region.view(one), part(one))
    assert torch.equal(region.view(other), part(other))
    assert region.view(other).stride() == part(other).stride()
    assert (region.numel, region.nbytes) == (part(one).numel(), part(one).nbytes)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float64], ids=str)
def test_offsets_count_from_the_tensor_not_from_its_storage(part: Part, dtype: torch.dtype) -> None:
    storage = torch.arange(100).to(dtype)
    root = storage[7:31].view(4, 6)
    region = Region.of(part(root), base_offset_bytes=7 * dtype.itemsize)
    elsewhere = torch.arange(200, 300).to(dtype)[50:74].view(4, 6)
    assert torch.equal(region.view(elsewhere), part(elsewhere))
    assert region == Region.of(part(root.clone()))


@pytest.mark.parametrize("part", [PARTS["columns"], PARTS["transposed"], PARTS["last element"]])
def test_view_shares_memory(part: Part) -> None:
    tensor, expected = torch.zeros(4, 6), torch.zeros(4, 6)
    Region.of(part(tensor)).view(tensor).fill_(1.0)
    part(expected).fill_(1.0)
    assert torch.equal(tensor, expected)


def test_meta_tensors_have_the_same_regions() -> None:
    real, meta = torch.zeros(4, 6), torch.zeros(4, 6, device="meta")
    for part in PARTS.values():
        assert Region.of(part(meta)) == Region.of(part(real))


@pytest.mark.parametrize("part", [part for name, part in PARTS.items() if name != "no columns"])
def test_is_contiguous_is_torchs_own(part: Part) -> None:
    tensor = torch.zeros(4, 6)
    assert Region.of(part(tensor)).is_contiguous is part(tensor).is_contiguous()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(()),
        torch.empty(0),
        torch.empty(1, 5, 1),
        torch.empty(2, 3, 4),
        torch.empty(5, 1).t(),
        torch.empty(2, 3, 4).transpose(0, 1),
        torch.empty(2, 3, 4)[:, :, :1],
        torch.empty(2, 1, 4).expand(2, 3, 4),
        torch.empty(4, 4).as_strided((2, 2), (1, 1)),
    ],
    ids=lambda tensor: f"{list(tensor.shape)}/{list(tensor.stride())}",
)
def test_is_contiguous_on_degenerate_shapes(tensor: torch.Tensor) -> None:
    assert Region.of(tensor).is_contiguous is tensor.is_contiguous()


@pytest.mark.parametrize("tensor", [torch.empty(3, 0), torch.empty(4, 6)[:, 6:]], ids=["[3, 0]", "no columns"])
def test_is_contiguous_without_elements(tensor: torch.Tensor) -> None:
    assert Region.of(tensor).is_contiguous is tensor.is_contiguous()


def test_wrong_dtype_is_refused() -> None:
    region = Region.of(torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"torch\.bfloat16 cannot view a tensor of torch\.float16"):
        region.view(torch.zeros(4, dtype=torch.float16))


SHAPES = [(), (1,), (5,), (1, 1), (4, 6), (3, 1, 2), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_is_all_of_a_contiguous_tensor(shape: tuple[int, ...]) -> None:
    assert Region.whole(shape, torch.int8) == Region.of(torch.empty(shape, dtype=torch.int8))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 4)], ids=str)
def test_whole_of_nothing_is_nothing(shape: tuple[int, ...]) -> None:
    region = Region.whole(shape, torch.int8)
    assert (region.shape, region.numel, region.nbytes, region.is_contiguous) == (shape, 0, 0, True)
    assert region.view(torch.empty(shape, dtype=torch.int8)).shape == shape


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_flat_is_the_elements_in_order_of_contiguous_regions_only(part: Part) -> None:
    tensor = torch.arange(24.0).view(4, 6)
    region = Region.of(part(tensor))
    if not region.is_contiguous:
        with pytest.raises(AssertionError):
            region.flat()
        return
    assert torch.equal(region.flat().view(tensor), part(tensor).flatten())
    assert region.flat().flat() == region.flat()


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_rows_and_row_are_torchs_slices(part: Part) -> None:
    tensor = torch.arange(24.0).view(4, 6)
    expected, region = part(tensor), Region.of(part(tensor))
    for start in range(expected.shape[0] if expected.dim() else 0):
        for count in (1, 2, 100):
            rows = region.rows(start, count)
            assert torch.equal(rows.view(tensor), expected[start : start + count])
            assert rows.view(tensor).stride() == expected.stride()
        assert torch.equal(region.rows(start, 1).row().view(tensor), expected[start])


def test_row_is_of_one_row() -> None:
    with pytest.raises(AssertionError):
        Region.whole((2, 3), torch.int8).row()


@pytest.mark.parametrize(
    "part",
    [PARTS["all"], PARTS["rows"], PARTS["row"], PARTS["last element"], lambda t: t[:1, 3:4], lambda t: t[1:2, 2]],
    ids=["all", "rows", "row", "last element", "1 x 1", "one of a column"],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_bytes_are_those_of_the_contiguous_part(part: Part, dtype: torch.dtype) -> None:
    tensor = torch.arange(100).remainder(7).to(dtype)[9:33].view(4, 6)
    data = Region.of(part(tensor), base_offset_bytes=9 * dtype.itemsize).bytes_of(tensor)
    assert (data.dim(), data.dtype, data.is_contiguous()) == (1, torch.uint8, True)
    assert data.data_ptr() == part(tensor).data_ptr()
    assert bytes(data.tolist()) == bytes(part(tensor).clone().untyped_storage().tolist())[: data.numel()]
    assert data.numel() == part(tensor).nbytes


def test_bytes_of_a_strided_part_are_refused() -> None:
    tensor = torch.zeros(4, 6)
    with pytest.raises(AssertionError):
        Region.of(PARTS["columns"](tensor)).bytes_of(tensor)
