"""Which engine a request goes to (trainer)."""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

# As vLLM's prefix cache: shorter prefixes are not kept there either.
BLOCK_TOKENS = 16
MOST_BLOCKS = 1 << 18
# How much more than the least loaded engine, as a share, one may have to do that holds a prefix.
SLACK = 0.25


class Router:
    """Sends each prompt to the engine with the least to do, or to one that holds its beginning and is not far behind.

    What an engine has to do is counted in tokens that it may still have to compute, for this pool's requests alone.
    With `in_turn`, engines take turns, whatever they have to do. Not thread-safe.
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
        """Tokens that each engine may still have to compute."""
        return tuple(self._loads)

    def start(self, prompt: Sequence[int], *, tokens: int) -> int:
        """Choose an engine for a prompt whose completions may take this many tokens."""
        cost = len(prompt) + tokens
        engine = self._choose(prompt, cost) if self._turns is None else next(self._turns)
        self._loads[engine] += cost
        self.hold(prompt, engine)
        return engine

    def end(self, engine: int, prompt: Sequence[int], *, tokens: int) -> None:
        """The request is over, however it went."""
        self._loads[engine] -= len(prompt) + tokens

    def hold(self, token_ids: Sequence[int], engine: int) -> None:
        """The engine has computed these tokens: a conversation that goes on from them should find it again."""
        for block in _blocks(token_ids):
            self._holders[block] = engine
            self._holders.move_to_end(block)
        while len(self._holders) > MOST_BLOCKS:
            self._holders.popitem(last=False)

    def _choose(self, prompt: Sequence[int], cost: int) -> int:
        least = min(self._order, key=self._loads.__getitem__)
        holder = self._holder(prompt)
        if holder is None or self._loads[holder] > self._loads[least] + max(cost, SLACK * self._loads[least]):
            return least
        return holder

    def _holder(self, prompt: Sequence[int]) -> int | None:
        """The engine that holds the longest known beginning."""
        found = None
        for block in _blocks(prompt):
            if block not in self._holders:
                break
            found = self._holders[block]
        return found


def _blocks(token_ids: Sequence[int]) -> list[int]:
    """A hash of each beginning of whole blocks."""
    hashes: list[int] = []
    before = 0
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        before = hash((before, *token_ids[start : start + BLOCK_TOKENS]))
        hashes.append(before)
    return hashes
