"""vLLM's settings for LoRA: accepted ranks, engine arguments, adapter ids and requests (engine process, worker)."""

from functools import cache
from typing import Any, get_args

# Ranks that vLLM accepts, for versions that do not list them.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def lora_args(rank: int, *, versions: int) -> dict[str, Any]:
    """Return vLLM's arguments for engines that serve `versions` adapters of at most this rank at a time."""
    accepted = accepted_rank(rank, accepted_ranks())
    return {"enable_lora": True, "max_lora_rank": accepted, "max_loras": versions, "max_cpu_loras": versions}


def accepted_ranks() -> tuple[int, ...]:
    """Return the ranks that this vLLM has kernels for, ascending."""
    from vllm.config import lora

    return tuple(sorted(get_args(getattr(lora, "MaxLoRARanks", None)))) or RANKS


def accepted_rank(rank: int, ranks: tuple[int, ...]) -> int:
    """Return the least of `ranks` (ascending) that holds an adapter of this rank; zeros fill what is left.

    Raises `ValueError` if none does.
    """
    for accepted in ranks:
        if accepted >= rank:
            return accepted
    raise ValueError(f"lora_rank {rank} is more than vLLM accepts: at most {ranks[-1]}")


def adapter_id(slot: int) -> int:
    """Return vLLM's number of the adapter in a slot. It stays the same while the slot's weights change."""
    return slot + 1


@cache
def adapter_request(slot: int) -> Any:
    """Return the `LoRARequest` for requests that are served with the adapter in a slot."""
    from vllm.lora.request import LoRARequest

    # vLLM wants a path and never reads it: the adapter is registered.
    return LoRARequest(f"rollcast-{slot}", adapter_id(slot), "in-memory")
