"""The choice of an engine for each prompt (trainer)."""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

# As in vLLM's prefix cache, which caches whole blocks only.
BLOCK_TOKENS = 16
MAX_BLOCKS = 1 << 18
# An engine that has a prefix cached is chosen while its load exceeds the least load by at most this share.
SLACK = 0.25


class Router:
    """Chooses the least loaded engine for a prompt, or one that has its beginning cached and is not much more loaded.

    An engine's load is the number of tokens that it may still have to compute for this pool's requests. With
    `in_turn`, engines take turns, whatever their load. Not thread-safe.
    """

    def __init__(self, engines: int, *, first: int = 0, in_turn: bool = False) -> None:
        self._loads = [0] * engines
        # By hash of all blocks up to here: the engine, least recently used first.
        self._holders: OrderedDict[int, int] = OrderedDict()
        # Pools of several trainer ranks should not all begin with engine 0.
        self._order = [(first + place) % engines for place in range(engines)]
        self._turns = itertools.cycle(self._order) if in_turn else None

    @property
    def loads(self) -> tuple[int, ...]:
        """Number of tokens that each engine may still have to compute."""
        return tuple(self._loads)

    def start(self, prompt: Sequence[int], *, tokens: int) -> int:
        """Choose an engine for a prompt whose completions may have this many tokens, and add them to its load."""
        cost = len(prompt) + tokens
        engine = self._choose(prompt, cost) if self._turns is None else next(self._turns)
        self._loads[engine] += cost
        self.hold(prompt, engine)
        return engine

    def end(self, engine: int, prompt: Sequence[int], *, tokens: int) -> None:
        """Subtract a request that is over from its engine's load."""
        self._loads[engine] -= len(prompt) + tokens

    def hold(self, token_ids: Sequence[int], engine: int) -> None:
        """Note that an engine has computed these tokens: a conversation that goes on from them should go there."""
        for block in _blocks(token_ids):
            self._holders[block] = engine
            self._holders.move_to_end(block)
        while len(self._holders) > MAX_BLOCKS:
            self._holders.popitem(last=False)

    def _choose(self, prompt: Sequence[int], cost: int) -> int:
        least = min(self._order, key=self._loads.__getitem__)
        holder = self._holder(prompt)
        if holder is None or self._loads[holder] > self._loads[least] + max(cost, SLACK * self._loads[least]):
            return least
        return holder

    def _holder(self, prompt: Sequence[int]) -> int | None:
        """Return the engine that has computed the longest known beginning of the prompt."""
        holder = None
        for block in _blocks(prompt):
            if block not in self._holders:
                break
            holder = self._holders[block]
        return holder


def _blocks(token_ids: Sequence[int]) -> list[int]:
    """Return a hash of each beginning that consists of whole blocks."""
    hashes: list[int] = []
    before = 0
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        before = hash((before, *token_ids[start : start + BLOCK_TOKENS]))
        hashes.append(before)
    return hashes
