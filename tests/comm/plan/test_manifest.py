"""The manifest, and the weights of a trainer under their checkpoint names."""

import hashlib
from collections.abc import Iterator

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard

from rollcast.comm import Manifest, ParamSpec, WeightSource

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
BASE = (("a", (2, 3), torch.float32), ("b", (), torch.bool), ("c", (0, 4), torch.int8))


class Net(nn.Module):
    """Tied weights, a buffer that is saved, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("cache", torch.zeros(3), persistent=False)


NET_NAMES = ["scale", "embed.weight", "norm.weight", "norm.bias"]


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A default process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def manifest(*rows: tuple[str, tuple[int, ...], torch.dtype]) -> Manifest:
    return Manifest(tuple(ParamSpec(*row) for row in rows))


def names(source: WeightSource) -> list[str]:
    return [spec.name for spec in source.manifest.specs]


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
def test_digest_tells_manifests_apart(other: tuple) -> None:
    assert manifest(*BASE).digest == manifest(*BASE).digest
    assert manifest(*other).digest != manifest(*BASE).digest


def test_sizes_are_those_of_tensors() -> None:
    for name, shape, dtype in BASE:
        tensor, spec = torch.empty(shape, dtype=dtype), ParamSpec(name, shape, dtype)
        assert (spec.numel, spec.nbytes) == (tensor.numel(), tensor.nbytes)
    assert manifest(*BASE).nbytes == 24 + 1 + 0


def test_duplicate_names_and_empty_manifests_are_refused() -> None:
    with pytest.raises(ValueError, match="parameter a is listed twice"):
        manifest(BASE[0], BASE[1], BASE[0])
    with pytest.raises(ValueError, match="at least one"):
        WeightSource({})


@pytest.mark.parametrize(
    ("other", "words"),
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
def test_difference_names_the_first_divergent_parameter(other: tuple, words: str | None) -> None:
    assert manifest(*BASE).difference(manifest(*other)) == words


def test_module_sends_tied_weights_once_and_only_persistent_buffers() -> None:
    net = Net()
    source = WeightSource(net)
    got = list(source)
    assert names(source) == NET_NAMES == [spec.name for spec, _ in got]
    for (spec, tensor), expected in zip(
        got, (net.get_buffer("scale"), net.embed.weight, *net.norm.parameters()), strict=True
    ):
        assert torch.equal(tensor, expected)
        assert (spec.shape, spec.dtype) == (tuple(tensor.shape), tensor.dtype)


def test_wrappers_leave_no_trace_in_names() -> None:
    net = Net()
    # Compiling is lazy: nothing is compiled here, the names are.
    net.norm = torch.compile(checkpoint_wrapper(net.norm))  # pyright: ignore[reportAttributeAccessIssue]
    assert any("_orig_mod" in name for name, _ in net.named_parameters())
    compiled = torch.compile(net)
    assert isinstance(compiled, nn.Module)
    assert names(WeightSource(compiled)) == NET_NAMES
    assert names(WeightSource(checkpoint_wrapper(Net()))) == NET_NAMES


@pytest.mark.usefixtures("one_rank")
def test_ddp_leaves_no_trace_in_names() -> None:
    assert names(WeightSource(nn.parallel.DistributedDataParallel(Net()))) == NET_NAMES


@pytest.mark.usefixtures("one_rank")
def test_sharded_module_yields_full_plain_tensors() -> None:
    net = Net()
    expected = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fully_shard(net, mesh=dist.init_device_mesh("cpu", (1,)))
    got = list(WeightSource(net, dtype=torch.bfloat16))
    assert [spec.name for spec, _ in got] == NET_NAMES
    for spec, tensor in got:
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, expected[spec.name])


def test_state_dict_keeps_views_that_differ_and_drops_aliases() -> None:
    flat = torch.arange(12.0)
    weights = {
        "flat": flat,
        "matrix": flat.view(3, 4),
        "transposed": flat.view(4, 3).t(),
        "head": flat[:6],
        "tail": flat[6:],
        "bits": flat.view(torch.int32),
        "alias": flat.view(3, 4).detach(),
        "equal": flat.clone(),
        "empty": torch.empty(0),
        "empty_too": torch.empty(0),
    }
    source = WeightSource(weights)
    assert names(source) == [name for name in weights if name != "alias"]
    for spec, tensor in source:
        assert torch.equal(tensor, weights[spec.name])


def test_state_dict_of_a_module_equals_the_module() -> None:
    net = Net()
    assert WeightSource(net.state_dict()).manifest == WeightSource(net).manifest


def test_wire_dtype_changes_floating_point_specs_only() -> None:
    weights = {
        "master": torch.randn(3),
        "half": torch.randn(3).half(),
        "count": torch.arange(3),
        "mask": torch.ones(3, dtype=torch.bool),
        "index": torch.zeros(3, dtype=torch.uint8),
    }
    source = WeightSource(weights, dtype=torch.bfloat16)
    wire = [torch.bfloat16, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
    assert [spec.dtype for spec in source.manifest.specs] == wire
    # The values stay what the trainer holds: casting is the packer's work.
    assert [tensor.dtype for _, tensor in source] == [tensor.dtype for tensor in weights.values()]
    assert [spec.dtype for spec in WeightSource(weights).manifest.specs] == [t.dtype for t in weights.values()]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_integer_wire_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=str(dtype)):
        WeightSource({"a": torch.ones(2)}, dtype=dtype)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.empty(2, device="meta"), "b.weight .*meta"),
        ([1.0, 2.0], "b.weight is not a tensor but list"),
        (None, "b.weight is not a tensor but NoneType"),
    ],
    ids=["meta", "list", "none"],
)
def test_values_without_data_are_refused_by_name(bad: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WeightSource({"a.weight": torch.ones(2), "b.weight": bad})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b": torch.ones(3, 2)}, r"expected b \[2, 3\] float32, got b \[3, 2\] float32"),
        ({"b": torch.ones(2, 3).double()}, r"expected b \[2, 3\] float32, got b \[2, 3\] float64"),
        ({"c": torch.ones(1)}, r"extra c \[1\] float32"),
        ({"b": None}, "b is not a tensor"),
    ],
    ids=["shape", "dtype", "extra", "none"],
)
def test_weights_that_changed_are_refused_before_the_first_tensor(change: dict, words: str) -> None:
    weights = {"a": torch.zeros(2), "b": torch.zeros(2, 3)}
    source = WeightSource(weights)
    weights.update(change)
    with pytest.raises(ValueError, match=words):
        next(source.walk([0]))


def test_new_values_are_sent_wherever_they_live() -> None:
    weights = {"a": torch.zeros(2), "b": nn.Parameter(torch.zeros(3))}
    source = WeightSource(weights)
    weights["a"].fill_(1.0)
    weights["b"] = nn.Parameter(torch.full((3,), 2.0))
    assert [tensor.tolist() for _, tensor in source] == [[1.0, 1.0], [2.0, 2.0, 2.0]]
    assert not any(tensor.requires_grad for _, tensor in source)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1,), ()], ids=str)
def test_walk_yields_the_parameters_asked_for_in_that_order(order: tuple[int, ...]) -> None:
    weights = {"a": torch.zeros(2), "b": torch.ones(3).half(), "c": torch.arange(4)}
    got = list(WeightSource(weights, dtype=torch.bfloat16).walk(order))
    assert [param for param, _ in got] == list(order)
    for param, tensor in got:
        assert tensor.data_ptr() == list(weights.values())[param].data_ptr()
