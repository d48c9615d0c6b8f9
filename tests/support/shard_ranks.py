"""What several trainer ranks hold of some weights: uneven rows in memory of their own, and a parameter of one rank."""

from collections.abc import Mapping

import torch
from ranks import Weights

from rollcast.comm import Holding

State = dict[str, Holding]
LAST = "last"


def full_weights(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    torch.manual_seed(seed)
    weights = {f"p{index}": torch.randn(4 * index + 4, 60, dtype=dtype) for index in range(6)}
    return weights | {LAST: torch.randn(8, 60, dtype=dtype)}


def shard_rows(weights: Mapping[str, torch.Tensor], ranks: int) -> list[State]:
    """Cut the rows as torch does: the last rank may have fewer, or none. The last rank alone has `LAST`."""
    states: list[State] = [{} for _ in range(ranks)]
    for name, full in weights.items():
        rows = full.shape[0] if name == LAST else -(-full.shape[0] // ranks)
        for rank, state in enumerate(states):
            start = min(rank * rows, full.shape[0]) if name != LAST else 0
            if name != LAST or rank == ranks - 1:
                state[name] = Holding(full[start : start + rows].clone(), full.shape, (start, 0))
    return states


def refresh(states: list[State], weights: Mapping[str, torch.Tensor]) -> None:
    """Give the ranks' own memory the values of the full weights."""
    for state in states:
        for name, held in state.items():
            start = held.start[0]
            held.tensor.copy_(weights[name][start : start + held.tensor.shape[0]])
