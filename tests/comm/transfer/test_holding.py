"""What a rank holds, as torch's own sharding lays it out: compared with the full tensor, rank by rank.

Each rank is simulated in turn, with torch's "fake" process group: splitting a tensor takes no communication.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_ranks import rank_of
from shards import indices
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from rollcast.comm import Box, Holding, WeightSource
from rollcast.comm.transfer.gathering import GatheringSource

Full = dict[str, torch.Tensor]


def full_weights() -> Full:
    shapes = {"a.weight": (13, 6), "a.bias": (13,), "b.weight": (3, 13), "b.bias": (3,), "one": (1, 5)}
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


class Net(nn.Module):
    """Two linear layers, a parameter of one row, and a buffer."""

    def __init__(self, full: Full) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 13), nn.Linear(13, 3)
        self.one = nn.Parameter(torch.empty(1, 5))
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))
        self.load_state_dict({**full, "scale": self.get_buffer("scale")})


def sharded(net: Net, mesh: DeviceMesh, placements: dict[str, list[Any]]) -> None:
    """Make parameters `DTensor`s, each rank with its part."""
    for name, placed in placements.items():
        owner, _, attribute = name.rpartition(".")
        part = net.get_submodule(owner)
        tensor = distribute_tensor(getattr(part, attribute).data, mesh, placed, src_data_rank=None)
        setattr(part, attribute, nn.Parameter(tensor))


def fsdp2(net: Net, world: int) -> None:
    fully_shard(net.a)
    fully_shard(net)


def hsdp(net: Net, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(net.b, mesh=mesh)
    fully_shard(net, mesh=mesh)


def tensor_parallel(net: Net, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    sharded(net, mesh, {"a.weight": [Shard(0)], "a.bias": [Shard(0)], "b.weight": [Shard(1)], "b.bias": [Replicate()]})


def fsdp2_and_tensor_parallel(net: Net, world: int) -> None:
    """FSDP2 cuts what a tensor-parallel rank has: `_StridedShard`."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    sharded(net, mesh["tp"], {"a.weight": [Shard(0)], "a.bias": [Shard(0)], "b.weight": [Shard(1)]})
    fully_shard(net, mesh=mesh["dp"])


def columns(net: Net, world: int) -> None:
    """FSDP2 cuts another dimension than the first."""
    fully_shard(net, shard_placement_fn=lambda param: Shard(1) if param.shape == (13, 6) else None)


LAYOUTS: dict[str, tuple[Callable[[Net, int], None], tuple[int, ...]]] = {
    "FSDP2": (fsdp2, (1, 2, 3, 4, 8)),
    "HSDP": (hsdp, (2, 4, 6)),
    "tensor parallel": (tensor_parallel, (1, 2, 3, 5)),
    "FSDP2 and tensor parallel": (fsdp2_and_tensor_parallel, (2, 4, 8)),
    "columns": (columns, (1, 2, 3)),
}
CASES = [(name, world) for name, (_, worlds) in LAYOUTS.items() for world in worlds]


@pytest.mark.parametrize(("layout", "world"), CASES)
def test_every_rank_states_what_it_has(layout: str, world: int) -> None:
    full = full_weights()
    marks = {name: torch.zeros(tensor.shape, dtype=torch.int) for name, tensor in full.items()}
    for rank in range(world):
        with rank_of(world, rank):
            net = Net(full)
            LAYOUTS[layout][0](net, world)
            source = WeightSource(net)
            got = {source.manifest.specs[p].name: parts for p, parts in source.gather(range(len(full) + 1))}
            assert [spec.name for spec in source.manifest.specs] == list(net.state_dict())
            assert source.stable_params() is not None
            for held in source.statement:
                (box,), (part,) = held.boxes, got[held.spec.name]
                if held.spec.name == "scale":
                    assert box == Box.whole((2,)) and torch.equal(part, torch.tensor([2.0, 3.0]))
                    continue
                where = indices(box)
                assert torch.equal(part, full[held.spec.name][where])
                assert isinstance(net.get_parameter(held.spec.name), DTensor) or box == Box.whole(box.shape)
                marks[held.spec.name][where] += 1
    for name, mark in marks.items():
        assert mark.min() >= 1, name


@pytest.mark.parametrize("originals", [True, False], ids=["use_orig_params", "flat"])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fsdp1_has_ranges_of_flattened_parameters(strategy: str, originals: bool) -> None:
    full = full_weights() | {"scale": torch.tensor([2.0, 3.0])}
    marks = {name: torch.zeros(tensor.numel(), dtype=torch.int) for name, tensor in full.items()}
    for rank in range(3):
        with rank_of(3, rank):
            net: Any = Net(full_weights())
            options: dict[str, Any] = {"use_orig_params": originals, "device_id": torch.device("cpu")}
            options["sharding_strategy"] = ShardingStrategy[strategy]
            net.a = FullyShardedDataParallel(net.a, **options)
            source = WeightSource(FullyShardedDataParallel(net, **options))
            assert {spec.name: spec.shape for spec in source.manifest.specs} == {n: t.shape for n, t in full.items()}
            for held, (_, (part,)) in zip(source.statement, source.gather(range(len(full))), strict=True):
                (box,) = held.boxes
                where = indices(box)
                assert torch.equal(part, full[held.spec.name].view(box.shape)[where])
                marks[held.spec.name].view(box.shape)[where] += 1
    assert all(mark.min() >= 1 for mark in marks.values())


def test_zero3_has_an_even_share_of_the_flattened_padded_parameter() -> None:
    """As DeepSpeed keeps it: the parameter is empty, `ds_tensor` has this rank's share."""
    full = torch.arange(13 * 6, dtype=torch.float32).view(13, 6)
    share = -(-full.numel() // 4)
    padded = torch.cat((full.flatten(), torch.full((4 * share - full.numel(),), -1.0)))
    rows: list[torch.Tensor] = []
    for rank in range(4):
        with rank_of(4, rank):
            param = nn.Parameter(torch.empty(0))
            for name, value in {"ds_shape": full.shape, "ds_tensor": padded.split(share)[rank]}.items():
                setattr(param, name, value)
            source = WeightSource({"w": param})
            assert source.manifest.specs[0].shape == (13, 6)
            ((box,),) = (held.boxes for held in source.statement)
            assert box == Box((78,), (rank * share,), (min(78, (rank + 1) * share),))
            ((_, (part,)),) = source.gather([0])
            rows.append(part)
    assert torch.equal(torch.cat(rows).view(13, 6), full)


def test_a_forward_pass_leaves_the_same_shards() -> None:
    """FSDP2's root keeps its parameters whole between forward and backward pass."""
    with rank_of(2, 1):
        net: Any = Net(full_weights())
        fully_shard(net)
        source = WeightSource(net)
        before = source.stable_params()
        net.unshard()
        assert not isinstance(net.one, DTensor)
        assert source.peek_manifest() is source.manifest
        assert source.stable_params() is before


def test_new_local_memory_is_noticed() -> None:
    with rank_of(2, 0):
        net = Net(full_weights())
        fully_shard(net)
        source = WeightSource(net)
        before = source.stable_params()
        net.a.weight._local_tensor = net.a.weight._local_tensor.clone()  # type: ignore[attr-defined]
        source.current_manifest()
        assert source.stable_params() is not before


def test_pending_sums_are_refused() -> None:
    with rank_of(2, 0):
        tensor = DTensor.from_local(torch.ones(3), init_device_mesh("cpu", (2,)), [Partial()])
        with pytest.raises(ValueError, match="w cannot be sent: its placement is"):
            WeightSource({"w": tensor})


def test_ranks_outside_a_mesh_hold_nothing() -> None:
    """As pipeline stages have it."""
    with rank_of(4, 3):
        mesh = DeviceMesh("cpu", [0, 1], _init_backend=False)
        tensor = DTensor.from_local(torch.ones(0, 4), mesh, [Shard(0)], shape=torch.Size((6, 4)), stride=(4, 1))
        (held,) = WeightSource({"w": tensor}).statement
        assert held.boxes[0].numel == 0


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (Holding(torch.ones(3), (6, 4), (0,)), "w: a tensor of shape [3] cannot be a part of [6, 4]"),
        (Holding(torch.ones(3, 4), (6, 4), (4, 0)), "w: not a part of shape [6, 4]"),
        (Holding(torch.ones(3), (6, 4), (0,), (25,)), "w: view [25] has not as many elements as shape [6, 4]"),
        (
            (Holding(torch.ones(1, 4), (6, 4), (0, 0)), Holding(torch.ones(1, 4), (7, 4), (0, 0))),
            "w: its holdings state different shapes",
        ),
        (
            (Holding(torch.ones(1, 4), (6, 4), (0, 0)), Holding(torch.ones(1, 4).half(), (6, 4), (1, 0))),
            "w: its parts differ in dtype",
        ),
        ((), "w is not a tensor but tuple"),
        ([Holding(torch.ones(1, 4), (6, 4), (0, 0))], "w is not a tensor but list"),
        ("text", "w is not a tensor but str"),
    ],
)
def test_what_cannot_be_a_part_is_refused_by_name(held: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        WeightSource({"w": held})


def test_a_view_of_memory_that_was_replaced_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(4, 3))
    source = WeightSource({"w": Holding(weight[:2], (4, 3), (0, 0))})
    assert source.stable_params() is not None
    weight.data = torch.ones(4, 3)
    with pytest.raises(ValueError, match="w: its holding is a view of memory that was replaced: make it anew"):
        source.peek_manifest()


def test_strided_holdings_are_found_once() -> None:
    """As the parts of fused weights are."""
    fused = torch.randn(2, 4, 3, 5)
    source = WeightSource({"w": Holding(fused[:, :2], (12, 5), (0, 0, 0, 0), (2, 2, 3, 5))})
    assert source.stable_params() is not None


def test_a_holding_of_a_sharded_tensor_is_refused() -> None:
    with rank_of(2, 0):
        tensor = distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)
        with pytest.raises(ValueError, match=r"w: a holding needs this rank's own tensor: pass to_local\(\)"):
            WeightSource({"w": Holding(tensor, (8, 3), (0, 0))})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("originals", [True, False], ids=["use_orig_params", "flat"])
def test_fsdp1_has_tied_parameters_once(originals: bool) -> None:
    for rank in range(2):
        with rank_of(2, rank):
            net: Any = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
            net["head"].weight = net["embed"].weight
            wrapped = FullyShardedDataParallel(net, use_orig_params=originals, device_id=torch.device("cpu"))
            ((box,),) = (held.boxes for held in WeightSource(wrapped).statement)
            assert box == Box((32,), (16 * rank,), (16 * rank + 16,))


def test_adapters_of_flattened_models_are_refused() -> None:
    param = nn.Parameter(torch.empty(0))
    for name, value in {"ds_shape": torch.Size((4, 2)), "ds_tensor": torch.zeros(4)}.items():
        setattr(param, name, value)
    with rank_of(2, 0), pytest.raises(ValueError, match="w: a peft model that FSDP1 or ZeRO-3 has flattened"):
        GatheringSource({"w": param})
