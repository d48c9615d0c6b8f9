"""Ranks and GPUs: which GPU each rank takes, what `check_placement` refuses, what the report shows."""

from dataclasses import replace
from typing import Any

import pytest

from rollcast.rollout import PreflightError, RolloutConfig
from rollcast.rollout.job.preflight import check_placement, describe
from rollcast.rollout.job.world import World
from rollcast.rollout.protocol.registry import RankInfo


def world(world_size: int, *, trainers: int = 1, rank: int = 0, colocate: bool = False) -> World:
    sizes: dict[str, Any] = {"world_size": world_size, "local_world_size": world_size, "tensor_parallel_size": 1}
    return World(rank=rank, local_rank=rank, trainers=trainers, colocate=colocate, **sizes)


def rank_info(gpu: str, **facts: Any) -> RankInfo:
    return RankInfo("a", gpu, 2, "10.0.0.1", **facts)


def test_preflight_names_ranks_with_other_nccl_settings() -> None:
    ranks = [rank_info("GPU-0"), rank_info("GPU-1", settings={"NCCL_P2P_DISABLE": "1"})]
    with pytest.raises(PreflightError, match="NCCL_P2P_DISABLE is not set on rank 0 and '1' on rank 1"):
        check_placement(ranks, world(2), device="cuda")


def test_a_frontend_takes_no_gpu() -> None:
    sizes: Any = {"world_size": 7, "trainers": 1, "tensor_parallel_size": 2, "trainer_gpus": False}
    first = [World(rank=rank, local_rank=rank, local_world_size=5, **sizes) for rank in range(5)]
    second = [World(rank=5 + rank, local_rank=rank, local_world_size=2, **sizes) for rank in range(2)]
    assert [rank.gpu_index for rank in (*first[1:], *second)] == [0, 1, 2, 3, 0, 1]
    places = [("a", None), *(("a", f"GPU-{gpu}") for gpu in range(4)), ("b", "GPU-0"), ("b", "GPU-1")]
    ranks = [RankInfo(host, gpu, 4 if host == "a" else 2, f"10.0.0.{ord(host)}") for host, gpu in places]
    check_placement(ranks, first[0], device="cuda")
    with pytest.raises(PreflightError, match="not enough GPUs on a: 5 ranks, 4 visible GPUs"):
        check_placement(ranks, replace(first[0], trainer_gpus=True), device="cuda")
    with pytest.raises(PreflightError, match="leave trainer_gpus True"):
        RolloutConfig(model="", dtype="float32", colocate=True, trainer_gpus=False)


def test_colocated_engines_use_the_trainers_gpus() -> None:
    worlds = [world(4, trainers=2, rank=rank, colocate=True) for rank in range(4)]
    assert [each.gpu_index for each in worlds] == [0, 1, 0, 1]
    check_placement([rank_info(f"GPU-{each.gpu_index}") for each in worlds], worlds[0], device="cuda")
    with pytest.raises(PreflightError, match="ranks 0 and 1 share GPU GPU-0"):
        check_placement([rank_info("GPU-0")] * 4, worlds[0], device="cuda")
    with pytest.raises(PreflightError, match="as many engine ranks as trainers"):
        world(3, trainers=2, colocate=True)


def test_the_report_names_the_gpu_of_each_rank() -> None:
    ranks = [
        rank_info("GPU-0", free_bytes=int(140e9), used_bytes=int(1e9), links={"GPU-1": "NVLink", "GPU-2": "PCIe"}),
        rank_info("GPU-1", free_bytes=int(141e9), links={"GPU-0": "NVLink"}),
        RankInfo("b", None, 0),
    ]
    assert describe(ranks) == [
        "rank 0 on a: GPU-0, 140 of 141 GB free, NVLink to the others",
        "rank 1 on a: GPU-1, 141 of 141 GB free, NVLink to the others",
        "rank 2 on b: CPU",
    ]
