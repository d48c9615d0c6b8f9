"""Checks before any engine starts: versions, settings, ranks, GPUs, prompts."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from rollcast.rollout import PreflightError, RolloutConfig
from rollcast.rollout.job.preflight import check_placement, check_vllm, preflight, select_visible
from rollcast.rollout.job.world import World, without_torchrun
from rollcast.rollout.pool.dispatcher import check_prompts
from rollcast.rollout.protocol.registry import RankInfo

UUIDS = ["GPU-aaaa-0", "GPU-aabb-1", "GPU-cccc-2", "GPU-dddd-3"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model folder whose config.json has bfloat16 and 64 tokens."""
    config = {"dtype": "bfloat16", "max_position_embeddings": 64, "eos_token_id": 7}
    Path(tmp_path, "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("0.26.0", (0, 26)),
        ("0.33.9", (0, 33)),
        ("0.26.0+rocm700", (0, 26)),
        ("0.27.1.dev12+g0f3a.rocm711", (0, 27)),
        ("v0.30.0-rocm", (0, 30)),
        (" 0.29.1\n", (0, 29)),
    ],
)
def test_supported_vllm_versions(version: str, release: tuple[int, int]) -> None:
    assert check_vllm(version) == release


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0", "0.260.0", "0.3", "1.27.0", "garbage", "", "26"])
def test_unsupported_vllm_versions_are_named(version: str) -> None:
    with pytest.raises(PreflightError) as refusal:
        check_vllm(version)
    assert version in str(refusal.value)
    assert "0.26 to 0.33" in str(refusal.value)


def test_missing_vllm_is_an_error_with_what_to_install() -> None:
    with pytest.raises(PreflightError, match=r"not installed: install rollcast\[cuda\] or rollcast\[cpu\]"):
        check_vllm(None)


def test_prompts_must_leave_room_for_a_token() -> None:
    check_prompts([[1], [1] * 7], max_model_len=8)
    with pytest.raises(ValueError, match="prompt 1 has 8 tokens, but max_model_len is 8 "):
        check_prompts([[1] * 7, [1] * 8, [1] * 9], max_model_len=8)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        check_prompts([[1], []], max_model_len=8)


def infos(*places: tuple[str, str | None], visible: int = 8) -> list[RankInfo]:
    return [RankInfo(host, gpu, visible, f"10.0.0.{ord(host)}") for host, gpu in places]


@pytest.mark.parametrize(
    ("ranks", "tensor_parallel_size"),
    [
        (infos(("a", "GPU-0"), ("a", "GPU-1")), 1),
        (infos(("a", "GPU-0"), ("b", "GPU-0"), visible=1), 1),
        (infos(("a", "GPU-0"), ("b", "GPU-0"), ("b", "GPU-1"), visible=2), 2),
    ],
    ids=["one machine", "same UUID on two machines", "engine beside the trainer's machine"],
)
def test_placements_that_fit(ranks: list[RankInfo], tensor_parallel_size: int) -> None:
    check_placement(ranks, world(len(ranks), tensor_parallel_size=tensor_parallel_size), device="cuda")


@pytest.mark.parametrize(
    ("ranks", "tensor_parallel_size", "message"),
    [
        (infos(("a", "GPU-0"), ("a", "GPU-1"), ("a", "GPU-0")), 1, "ranks 0 and 2 share GPU GPU-0 on a"),
        (infos(("a", "GPU-0"), ("a", None), visible=1), 1, "not enough GPUs on a: 2 ranks, 1 visible GPUs"),
        (infos(("a", None), ("b", "GPU-0"), visible=0), 1, "not enough GPUs on a: 1 ranks, 0 visible GPUs"),
        (
            infos(("a", "GPU-0"), ("a", "GPU-1"), ("b", "GPU-0")),
            2,
            r"engine 0 \(ranks 1, 2\) spans the machines a, b",
        ),
    ],
    ids=["shared GPU", "too few", "none", "engine on two machines"],
)
def test_placements_that_do_not_fit(ranks: list[RankInfo], tensor_parallel_size: int, message: str) -> None:
    with pytest.raises(PreflightError, match=message):
        check_placement(ranks, world(len(ranks), tensor_parallel_size=tensor_parallel_size), device="cuda")


def test_cpu_ranks_share_a_machine_but_engines_do_not_span_two() -> None:
    check_placement(infos(("a", None), ("a", None), visible=0), world(2), device="cpu")
    with pytest.raises(PreflightError, match="spans the machines"):
        check_placement(infos(("a", None), ("a", None), ("b", None)), world(3, tensor_parallel_size=2), device="cpu")


@pytest.mark.parametrize(
    "visible", ["0,1", "2", "3,0", "1, 2", "0,9,1", "-1", "", "9", "2,-1,0", "GPU-c", "GPU-d,GPU-aab"]
)
def test_visible_gpus_are_those_of_torch(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    parsed: list[Any] = torch.cuda._parse_visible_devices()
    if parsed and isinstance(parsed[0], str):
        parsed = torch.cuda._transform_uuid_to_ordinals(parsed, UUIDS)
    in_range = parsed[: next((n for n, ordinal in enumerate(parsed) if ordinal >= len(UUIDS)), None)]
    assert select_visible(UUIDS, visible) == [UUIDS[ordinal] for ordinal in in_range]


def test_all_gpus_are_visible_by_default() -> None:
    assert (select_visible(UUIDS, None), select_visible([], "0")) == (UUIDS, [])


def test_settings_come_from_the_model(model: str) -> None:
    config = RolloutConfig(model=model)
    assert (config.torch_dtype(), config.resolved_max_model_len()) == (torch.bfloat16, 64)
    assert RolloutConfig(model=model, max_model_len=64, dtype="float32").resolved_max_model_len() == 64
    assert config.eos_token_ids() == (7,)
    Path(model, "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert config.eos_token_ids() == (3, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pause_mode": "stop"}, "unknown pause_mode 'stop', expected one of keep, wait, abort"),
        ({"device": "tpu"}, "unknown device 'tpu', expected one of auto, cpu, cuda"),
        ({"dtype": "float31"}, "unknown dtype 'float31', expected one of float32, bfloat16, float16"),
        ({"trainers": 0}, "trainers must be positive, got 0"),
        ({"tensor_parallel_size": -1}, "tensor_parallel_size must be positive, got -1"),
        ({"bucket_bytes": 0}, "bucket_bytes must be positive, got 0"),
        ({"sync_timeout_s": 0.0}, "sync_timeout_s must be positive"),
        ({"start_timeout_s": -2}, "start_timeout_s must be positive, got -2"),
        ({"trainer_timeout_s": 0}, "trainer_timeout_s must be positive, got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str, model: str) -> None:
    with pytest.raises(PreflightError, match=message):
        RolloutConfig(model=model, **settings)


@pytest.mark.parametrize("settings", [{"max_model_len": 0}, {"max_model_len": -5}, {"dtype": "int8"}], ids=str)
def test_settings_that_would_fail_later(settings: dict[str, Any], model: str) -> None:
    with pytest.raises(PreflightError):
        RolloutConfig(model=model, **settings).resolved_max_model_len()


def test_model_must_have_a_config(model: str, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="max_model_len 65 is more than the model's own 64"):
        RolloutConfig(model=model, max_model_len=65).resolved_max_model_len()
    with pytest.raises(PreflightError, match=r"nowhere' has no config\.json"):
        RolloutConfig(model=str(tmp_path / "nowhere"))
    Path(model, "config.json").write_text("{}")
    with pytest.raises(PreflightError, match="no max_position_embeddings: set max_model_len"):
        RolloutConfig(model=model).resolved_max_model_len()
    assert RolloutConfig(model=model, max_model_len=5).resolved_max_model_len() == 5
    assert RolloutConfig(model=model).torch_dtype() == torch.float32


def world(world_size: int, *, rank: int = 0, trainers: int = 1, tensor_parallel_size: int = 1) -> World:
    return World(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        trainers=trainers,
        tensor_parallel_size=tensor_parallel_size,
    )


def test_roles_of_two_trainers_and_two_engines_of_three() -> None:
    ranks = [world(8, rank=rank, trainers=2, tensor_parallel_size=3) for rank in range(8)]
    assert [each.is_trainer for each in ranks] == [True] * 2 + [False] * 6
    assert [each.is_leader for each in ranks] == [False, False, True, False, False, True, False, False]
    assert [each.engine for each in ranks[2:]] == [0, 0, 0, 1, 1, 1]
    assert ranks[0].engines == 2
    assert [list(ranks[0].engine_ranks(engine)) for engine in range(2)] == [[2, 3, 4], [5, 6, 7]]


@pytest.mark.parametrize(
    ("world_size", "trainers", "tensor_parallel_size", "suggested"),
    [(1, 1, 1, 2), (1, 2, 2, 4), (4, 1, 2, 3), (6, 2, 3, 5), (2, 2, 1, 3), (8, 1, 4, 5)],
)
def test_world_that_does_not_fit_suggests_one_that_does(
    world_size: int, trainers: int, tensor_parallel_size: int, suggested: int
) -> None:
    with pytest.raises(PreflightError, match=f"world size {world_size} .*--nproc-per-node {suggested}$"):
        world(world_size, trainers=trainers, tensor_parallel_size=tensor_parallel_size)
    world(suggested, trainers=trainers, tensor_parallel_size=tensor_parallel_size)


ENVIRON = {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}


def test_world_reads_torchruns_variables() -> None:
    rank = World.from_env(trainers=1, tensor_parallel_size=2, environ=ENVIRON | {"LOCAL_WORLD_SIZE": "2"})
    assert (rank.rank, rank.world_size, rank.local_rank, rank.local_world_size) == (3, 5, 1, 2)
    assert (rank.master_addr, rank.master_port, rank.agent_store) == ("h", 29500, False)
    assert rank.engine == 1
    agent = ENVIRON | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert World.from_env(trainers=1, tensor_parallel_size=2, environ=agent).agent_store


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_world_needs_torchrun(missing: str) -> None:
    environ = {name: value for name, value in ENVIRON.items() if name != missing}
    with pytest.raises(PreflightError, match=f"{missing} is not set: start the job with torchrun"):
        World.from_env(trainers=1, tensor_parallel_size=1, environ=environ)


def test_engines_do_not_see_torchruns_variables() -> None:
    ours = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK "
    ours += "ROLE_NAME ROLE_WORLD_SIZE TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_RESTART_COUNT"
    kept = {
        "PATH": "/bin",
        "NCCL_NVLS_ENABLE": "0",
        "CUDA_VISIBLE_DEVICES": "1",
        "MY_RANK": "1",
        "OMP_NUM_THREADS": "1",
    }
    assert without_torchrun(dict.fromkeys(ours.split(), "1") | kept) == kept


def test_a_rank_that_other_machines_cannot_reach_is_named() -> None:
    alone = [RankInfo("a", None, 0, "127.0.0.1"), RankInfo("a", None, 0, "127.0.0.1")]
    check_placement(alone, world(2), device="cpu")
    with pytest.raises(PreflightError, match="rank 1 on a has only a loopback address"):
        check_placement([RankInfo("b", None, 0, "10.0.0.1"), alone[0]], world(2), device="cpu")


@pytest.mark.parametrize("missing", [False, True], ids=["works", "rank 1 has no model"])
def test_preflight_ends_alike_on_all_ranks(missing: bool, model: str) -> None:
    store, folders = dist.HashStore(), (model, model + "/nowhere" if missing else model)
    configs = [RolloutConfig(model=folder, device="cpu", dtype="float32", max_model_len=8) for folder in folders]
    with ThreadPoolExecutor(2) as ranks:
        seen = [ranks.submit(preflight, config, world(2, rank=rank), store) for rank, config in enumerate(configs)]
    if missing:
        messages = {str(each.exception()) for each in seen}
        assert len(messages) == 1
        assert re.match(r"rank 1 on .*nowhere' has no config\.json", messages.pop())
    else:
        assert seen[0].result() == seen[1].result()
        assert [info.gpu for info in seen[0].result()] == [None, None]
