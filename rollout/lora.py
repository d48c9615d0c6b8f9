"""What vLLM has to be told of adapters: ranks that it accepts, ids, requests (engine process)."""

from functools import cache
from typing import Any, get_args

# What vLLM accepts where it does not say so.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def accepted_ranks() -> tuple[int, ...]:
    """The ranks that this vLLM has kernels for, ascending."""
    from vllm.config import lora

    return tuple(sorted(get_args(getattr(lora, "MaxLoRARanks", None)))) or RANKS


def accepted_rank(rank: int, ranks: tuple[int, ...]) -> int:
    """The least of `ranks` (ascending) that holds an adapter of this rank: zeros fill what is left.

    Raises `ValueError` if none does.
    """
    for accepted in ranks:
        if accepted >= rank:
            return accepted
    raise ValueError(f"lora_rank {rank} is more than vLLM accepts: at most {ranks[-1]}")


def lora_args(rank: int, *, versions: int) -> dict[str, Any]:
    """vLLM's arguments for engines that serve `versions` adapters of at most this rank at a time."""
    accepted = accepted_rank(rank, accepted_ranks())
    return {"enable_lora": True, "max_lora_rank": accepted, "max_loras": versions, "max_cpu_loras": versions}


def adapter_id(slot: int) -> int:
    """vLLM's number of the adapter in a slot. It stays while what is in the slot changes."""
    return slot + 1


@cache
def adapter_request(slot: int) -> Any:
    """What a request to vLLM brings along to be served with the adapter in a slot."""
    from vllm.lora.request import LoRARequest

    # vLLM wants a path. It never reads it: the adapter is there.
    return LoRARequest(f"rollcast-{slot}", adapter_id(slot), "in-memory")
