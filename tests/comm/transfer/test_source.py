"""The trainer's weights: names, specs and order of gathering; what a sync does when their memory has moved."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from ranks import LONG_S, Ranks, WatchedSource, receive, send
from sides import Sides, check_same_bytes, every_kind, full_tensors
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard

from rollcast.comm import Holders, WeightSource
from rollcast.comm.plan.buckets import LARGE_BYTES
from rollcast.comm.transfer.source import MANY_TENSORS


class Net(nn.Module):
    """A module with tied weights, a persistent buffer and one that is not persistent."""

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
    """Make a default process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def names(source: WeightSource) -> list[str]:
    return [spec.name for spec in source.manifest.specs]


def test_a_rank_may_have_nothing_but_not_all_ranks() -> None:
    nothing = WeightSource({})
    some = WeightSource({"w": torch.zeros(2)})
    assert Holders.of([nothing.statement, some.statement]).shares().keys() == {1}
    with pytest.raises(ValueError, match="no trainer rank has any parameter to send"):
        Holders.of([nothing.statement])


def test_released_weights_are_freed() -> None:
    weights = {"w": torch.zeros(4)}
    source = WeightSource(weights)
    memory = weakref.ref(weights["w"].untyped_storage())
    source.release()
    weights["w"].data = torch.ones(4)
    gc.collect()
    assert memory() is None


@pytest.mark.parametrize("count", [3, MANY_TENSORS])
def test_the_manifest_is_the_same_object_until_something_differs(count: int) -> None:
    """Else every sync compares every spec."""
    weights = {f"w{index}": torch.zeros(2) for index in range(count)}
    source = WeightSource(weights)
    source.release()
    assert source.peek_manifest() is source.manifest
    weights["w1"] = torch.zeros(2)
    assert source.peek_manifest() is source.manifest
    weights["w1"] = torch.zeros(3)
    assert source.peek_manifest() is not source.manifest
    with pytest.raises(ValueError, match=r"expected w1 \[2\] float32, got w1 \[3\] float32"):
        source.check_unchanged(source.peek_manifest())


def test_module_sends_tied_weights_once_and_only_persistent_buffers() -> None:
    net = Net()
    source = WeightSource(net)
    got = list(full_tensors(source))
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
    got = list(full_tensors(WeightSource(net, dtype=torch.bfloat16)))
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
    for spec, tensor in full_tensors(source):
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
    assert [tensor.dtype for _, tensor in full_tensors(source)] == [tensor.dtype for tensor in weights.values()]
    assert [spec.dtype for spec in WeightSource(weights).manifest.specs] == [t.dtype for t in weights.values()]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_integer_wire_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=str(dtype)):
        WeightSource({"a": torch.ones(2)}, dtype=dtype)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.empty(2, device="meta"), "b.weight .*meta"),
        ([1.0, 2.0], "b.weight is not a tensor but list"),
        (None, "b.weight is not a tensor but NoneType"),
    ],
    ids=["meta", "list", "none"],
)
def test_values_without_data_are_refused_by_name(bad: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightSource({"a.weight": torch.ones(2), "b.weight": bad})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.ones(3, 2)}, r"expected b \[2, 3\] float32, got b \[3, 2\] float32"),
        ({"b": torch.ones(2, 3).double()}, r"expected b \[2, 3\] float32, got b \[2, 3\] float64"),
        ({"c": torch.ones(1)}, r"extra c \[1\] float32"),
        ({"b": None}, "b is not a tensor"),
    ],
    ids=["shape", "dtype", "extra", "none"],
)
def test_weights_that_changed_are_refused_before_the_first_tensor(change: dict, message: str) -> None:
    weights = {"a": torch.zeros(2), "b": torch.zeros(2, 3)}
    source = WeightSource(weights)
    weights.update(change)
    with pytest.raises(ValueError, match=message):
        next(source.gather([0]))


def test_new_values_are_sent_wherever_they_live() -> None:
    weights = {"a": torch.zeros(2), "b": nn.Parameter(torch.zeros(3))}
    source = WeightSource(weights)
    weights["a"].fill_(1.0)
    weights["b"] = nn.Parameter(torch.full((3,), 2.0))
    assert [tensor.tolist() for _, tensor in full_tensors(source)] == [[1.0, 1.0], [2.0, 2.0, 2.0]]
    assert not any(tensor.requires_grad for _, tensor in full_tensors(source))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1,), ()], ids=str)
def test_gather_yields_the_requested_parameters_in_order(order: tuple[int, ...]) -> None:
    weights = {"a": torch.zeros(2), "b": torch.ones(3).half(), "c": torch.arange(4)}
    got = list(WeightSource(weights, dtype=torch.bfloat16).gather(order))
    assert [param for param, _ in got] == list(order)
    for param, (tensor,) in got:
        assert tensor.data_ptr() == list(weights.values())[param].data_ptr()


@pytest.fixture(params=[0, MANY_TENSORS], ids=["many", "few"])
def many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the source has so many tensors that each bucket checks its own when its turn comes."""
    monkeypatch.setattr("rollcast.comm.transfer.source.MANY_TENSORS", request.param)
    return not request.param


def test_weights_are_gathered_again_only_after_their_memory_has_moved(many: bool) -> None:
    weights = every_kind(seed=0) | {"big": torch.randn(LARGE_BYTES // 4)}
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    source = WatchedSource(contiguous)
    sides = Sides(source)
    with Ranks([0]) as ranks:
        for seed, gathered in (
            (1, True),
            (2, False),
            (3, True),
            (4, False),
            (5, True),
            (6, False),
            (7, True),
            (8, False),
        ):
            source.gathered = []
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
            assert bool(source.gathered) == gathered
            check_same_bytes(sides.memories[0].tensors, contiguous)


def test_weights_that_change_their_dtype_during_a_sync_fail_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollcast.comm.transfer.source.MANY_TENSORS", 0)
    weights = {name: torch.randn(300) for name in "abcd"}
    sides = Sides(WeightSource(weights, dtype=torch.bfloat16))
    with Ranks([0]) as ranks:
        sides.sync(ranks)
        weights["d"].data = weights["d"].data.bfloat16()
        receiving = ranks.start(receive, sides.receivers[0], ranks.workers[0])
        with pytest.raises(
            ValueError, match=r"d \[300\] bfloat16 changed its dtype, device or layout since the last sync"
        ):
            send(sides.broadcaster, ranks.senders)
        ranks.senders[0].close()
        with pytest.raises(RuntimeError):
            receiving.result(LONG_S)
    with Ranks([0]) as ranks:
        sides.sync(ranks)
        check_same_bytes(sides.memories[0].tensors, {name: tensor.bfloat16() for name, tensor in weights.items()})


def test_two_names_of_one_memory_are_both_checked(many: bool) -> None:
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
