"""Ranks that NCCL could not join, or would hang with, are named before it tries."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import distributed as dist

from rollcast.comm import Deadline, Lane
from rollcast.comm.device.fused_copy import FusedCopy
from rollcast.comm.transport.peers import Peer, PeerError, check_peers, check_settings, meet, nccl_settings
from rollcast.rollout import PreflightError, RolloutConfig
from rollcast.rollout.job.preflight import check_cards, describe
from rollcast.rollout.job.world import World
from rollcast.rollout.protocol.registry import Card
from rollcast.rollout.sync.lanes import transport_of

TRAINER = Peer("trainer rank 0", "a", "GPU-0", "2.28.9", {"NCCL_CUMEM_ENABLE": "1"})
WORKER = Peer("worker 0 of engine 0", "a", "GPU-1", "2.28.9", {"NCCL_CUMEM_ENABLE": "1"})


def test_peers_that_fit() -> None:
    check_peers([TRAINER, WORKER])
    check_peers([TRAINER, replace(WORKER, gpu="GPU-0", host="b")])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": "GPU-0"}, "trainer rank 0 and worker 0 of engine 0 share GPU GPU-0 on a"),
        ({"nccl": "2.27.5"}, "trainer rank 0 has NCCL 2.28.9 and worker 0 of engine 0 has NCCL 2.27.5"),
        ({"settings": {}}, "NCCL_CUMEM_ENABLE is '1' on trainer rank 0 and not set on worker 0 of engine 0"),
        ({"settings": {"NCCL_CUMEM_ENABLE": "0"}}, "NCCL_CUMEM_ENABLE is '1' on trainer rank 0 and '0' on worker 0"),
        ({"settings": {**TRAINER.settings, "NCCL_ALGO": "Ring"}}, "NCCL_ALGO is not set on trainer rank 0 and 'Ring'"),
    ],
    ids=["one GPU", "version", "missing", "different", "extra"],
)
def test_peers_that_do_not_fit_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(PeerError, match=words):
        check_peers([TRAINER, replace(WORKER, **change)])


def test_settings_of_a_rank_alone_may_differ() -> None:
    environ = {
        "NCCL_DEBUG": "INFO",
        "NCCL_SOCKET_IFNAME": "eth0",
        "NCCL_NVLS_ENABLE": "0",
        "NCCL_VERSION": "2",
        "X": "1",
    }
    assert nccl_settings(environ) == {"NCCL_NVLS_ENABLE": "0"}
    check_settings({"a": {}, "b": {}})


def test_every_rank_meets_the_others() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as ranks:
        met = [
            ranks.submit(meet, store, peer, rank=rank, size=2, deadline=Deadline(10))
            for rank, peer in enumerate((TRAINER, WORKER))
        ]
    assert [each.result() for each in met] == [[TRAINER, WORKER]] * 2


def world(world_size: int, *, trainers: int = 1, rank: int = 0, colocate: bool = False) -> World:
    sizes: dict[str, Any] = {"world_size": world_size, "local_world_size": world_size, "tensor_parallel_size": 1}
    return World(rank=rank, local_rank=rank, trainers=trainers, colocate=colocate, **sizes)


def card(gpu: str, **more: Any) -> Card:
    return Card("a", gpu, 2, "10.0.0.1", **more)


def test_preflight_names_ranks_with_other_nccl_settings() -> None:
    cards = [card("GPU-0"), card("GPU-1", settings={"NCCL_P2P_DISABLE": "1"})]
    with pytest.raises(PreflightError, match="NCCL_P2P_DISABLE is not set on rank 0 and '1' on rank 1"):
        check_cards(cards, world(2), device="cuda")


def test_a_front_door_takes_no_gpu() -> None:
    sizes: Any = {"world_size": 7, "trainers": 1, "tensor_parallel_size": 2, "trainer_gpus": False}
    first = [World(rank=rank, local_rank=rank, local_world_size=5, **sizes) for rank in range(5)]
    second = [World(rank=5 + rank, local_rank=rank, local_world_size=2, **sizes) for rank in range(2)]
    assert [rank.gpu_index for rank in (*first[1:], *second)] == [0, 1, 2, 3, 0, 1]
    places = [("a", None), *(("a", f"GPU-{gpu}") for gpu in range(4)), ("b", "GPU-0"), ("b", "GPU-1")]
    found = [Card(host, gpu, 4 if host == "a" else 2, f"10.0.0.{ord(host)}") for host, gpu in places]
    check_cards(found, first[0], device="cuda")
    with pytest.raises(PreflightError, match="not enough GPUs on a: 5 ranks, 4 visible GPUs"):
        check_cards(found, replace(first[0], trainer_gpus=True), device="cuda")
    with pytest.raises(PreflightError, match="leave trainer_gpus True"):
        RolloutConfig(model="", dtype="float32", colocate=True, trainer_gpus=False)


def test_colocated_engines_use_the_trainers_gpus() -> None:
    ranks = [world(4, trainers=2, rank=rank, colocate=True) for rank in range(4)]
    assert [rank.gpu_index for rank in ranks] == [0, 1, 0, 1]
    check_cards([card(f"GPU-{rank.gpu_index}") for rank in ranks], ranks[0], device="cuda")
    with pytest.raises(PreflightError, match="ranks 0 and 1 share GPU GPU-0"):
        check_cards([card("GPU-0")] * 4, ranks[0], device="cuda")
    with pytest.raises(PreflightError, match="as many engine ranks as trainers"):
        world(3, trainers=2, colocate=True)


def test_the_report_says_what_each_rank_runs_on() -> None:
    cards = [
        card("GPU-0", free_bytes=int(140e9), used_bytes=int(1e9), links={"GPU-1": "NVLink", "GPU-2": "PCIe"}),
        card("GPU-1", free_bytes=int(141e9), links={"GPU-0": "NVLink"}),
        Card("b", None, 0),
    ]
    assert describe(cards) == [
        "rank 0 on a: GPU-0, 140 of 141 GB free, NVLink to the others",
        "rank 1 on a: GPU-1, 141 of 141 GB free, NVLink to the others",
        "rank 2 on b: CPU",
    ]


@pytest.mark.parametrize(
    ("receivers", "settings", "expected"),
    [
        ([card("GPU-1")], {}, "ipc"),
        ([card("GPU-3")], {}, "nccl"),
        ([card("GPU-0")], {}, "ipc"),
        ([Card("b", "GPU-1", 2)], {}, "nccl"),
        ([card("GPU-1"), card("GPU-2")], {}, "nccl"),
        ([card("GPU-1")], {"transport": "ipc"}, "ipc"),
        ([card("GPU-0")], {"transport": "nccl"}, "nccl"),
        ([card("GPU-1")], {"device": "cpu"}, "gloo"),
    ],
    ids=["NVLink", "PCIe", "one GPU", "two machines", "two workers", "as told ipc", "as told nccl", "CPU"],
)
def test_the_transport_follows_the_gpus(receivers: list[Card], settings: dict[str, Any], expected: str) -> None:
    chosen: dict[str, Any] = {"device": "cuda"} | settings
    config = RolloutConfig(model="", dtype="float32", **chosen)
    lane = Lane(0, 0, tuple(range(len(receivers))), ())
    sender = card("GPU-0", links={"GPU-1": "NVLink", "GPU-2": "NVLink", "GPU-3": "one PCIe switch"})
    assert transport_of(lane, config=config, cards=[sender, *receivers]) == expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_many_copies_are_made_as_one(device: str) -> None:
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
