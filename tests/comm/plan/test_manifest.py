"""The manifest: its encoding and digest, what it refuses, the first difference from another."""

import hashlib

import pytest
import torch

from rollcast.comm import Manifest, ParamSpec

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
BASE = (("a", (2, 3), torch.float32), ("b", (), torch.bool), ("c", (0, 4), torch.int8))


def manifest(*rows: tuple[str, tuple[int, ...], torch.dtype]) -> Manifest:
    return Manifest(tuple(ParamSpec(*row) for row in rows))


def test_manifest_survives_the_wire_with_every_dtype() -> None:
    before = manifest(*((f"p.{dtype}", (index, 3), dtype) for index, dtype in enumerate(DTYPES)))
    after = Manifest.from_bytes(before.to_bytes())
    assert {torch.bool, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16} <= set(DTYPES)
    assert [(s.name, s.shape, s.dtype) for s in after.specs] == [(s.name, s.shape, s.dtype) for s in before.specs]
    assert after.digest == before.digest == hashlib.sha256(before.to_bytes()).hexdigest()


def test_manifest_survives_odd_names_and_shapes() -> None:
    before = manifest(('quote".é\n', (), torch.float16), ("", (0,), torch.float16), ("x", (2**40, 1), torch.int8))
    assert Manifest.from_bytes(before.to_bytes()) == before


@pytest.mark.parametrize(
    "other",
    [
        (("A", (2, 3), torch.float32), *BASE[1:]),
        (("a", (3, 2), torch.float32), *BASE[1:]),
        (("a", (6,), torch.float32), *BASE[1:]),
        (("a", (2, 3), torch.int32), *BASE[1:]),
        BASE[:2],
        (BASE[1], BASE[0], BASE[2]),
        (*BASE, ("d", (), torch.bool)),
    ],
    ids=["name", "shape", "rank", "dtype", "shorter", "order", "longer"],
)
def test_different_manifests_have_different_digests(other: tuple) -> None:
    assert manifest(*BASE).digest == manifest(*BASE).digest
    assert manifest(*other).digest != manifest(*BASE).digest


def test_sizes_are_those_of_tensors() -> None:
    for name, shape, dtype in BASE:
        tensor, spec = torch.empty(shape, dtype=dtype), ParamSpec(name, shape, dtype)
        assert (spec.numel, spec.nbytes) == (tensor.numel(), tensor.nbytes)
    assert manifest(*BASE).nbytes == 24 + 1 + 0


def test_duplicate_names_are_refused() -> None:
    with pytest.raises(ValueError, match="parameter a is listed twice"):
        manifest(BASE[0], BASE[1], BASE[0])


@pytest.mark.parametrize(
    ("other", "description"),
    [
        (BASE, None),
        ((BASE[0], ("b", (), torch.int8), ("c", (9,), torch.int8)), "expected b [] bool, got b [] int8"),
        ((("z", (2, 3), torch.float32), *BASE[1:]), "expected a [2, 3] float32, got z [2, 3] float32"),
        ((BASE[0], ("b", (1,), torch.bool), BASE[2]), "expected b [] bool, got b [1] bool"),
        ((BASE[0], BASE[2]), "expected b [] bool, got c [0, 4] int8"),
        (BASE[:1], "missing b [] bool"),
        ((*BASE, ("d", (7,), torch.int8), ("e", (), torch.int8)), "extra d [7] int8"),
    ],
    ids=["equal", "dtype", "name", "shape", "gap", "missing", "extra"],
)
def test_difference_names_the_first_divergent_parameter(other: tuple, description: str | None) -> None:
    assert manifest(*BASE).difference(manifest(*other)) == description
