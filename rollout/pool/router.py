"""The choice of an engine for each prompt (trainer)."""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence

# As in vLLM's prefix cache, which caches whole blocks only.
BLOCK_TOKENS = 16
MAX_BLOCKS = 1 << 18
# An engine that has a prefix cached is chosen while its load exceeds the least load by at most this share.
SLACK = 0.25


class PrefixHolders:
    """Which engine has computed the beginnings of earlier prompts.

        holders = PrefixHolders(block=16)
        holders.hold(prompt, engine)
        engine = holders.holder(longer_prompt)

    Prompts are tokens, or text; beginnings are whole blocks of `block` tokens, or characters. The least recently held
    are forgotten. Not thread-safe.
    """

    def __init__(self, *, block: int) -> None:
        self._block = block
        # By hash of all blocks up to here: the engine, least recently held first.
        self._engines: OrderedDict[int, int] = OrderedDict()

    def hold(self, prompt: Sequence[int] | str, engine: int) -> None:
        """Note that an engine has computed the prompt."""
        for beginning in self._beginnings(prompt):
            self._engines[beginning] = engine
            self._engines.move_to_end(beginning)
        while len(self._engines) > MAX_BLOCKS:
            self._engines.popitem(last=False)

    def holder(self, prompt: Sequence[int] | str) -> int | None:
        """Return the engine that has computed the longest known beginning of the prompt; None if none has."""
        holder = None
        for beginning in self._beginnings(prompt):
            if beginning not in self._engines:
                break
            holder = self._engines[beginning]
        return holder

    def _beginnings(self, prompt: Sequence[int] | str) -> Iterator[int]:
        """Yield a hash of each beginning that consists of whole blocks."""
        before = 0
        for start in range(0, len(prompt) - self._block + 1, self._block):
            block = prompt[start : start + self._block]
            before = hash((before, block if isinstance(block, str) else tuple(block)))
            yield before


class Router:
    """Chooses the least loaded engine for a prompt, or one that has its beginning cached and is not much more loaded.

    An engine's load is the number of tokens that it may still have to compute for this pool's requests. With
    `in_turn`, engines take turns, whatever their load. Not thread-safe.
    """

    def __init__(self, engines: int, *, first: int = 0, in_turn: bool = False) -> None:
        self._loads = [0] * engines
        self._holders = PrefixHolders(block=BLOCK_TOKENS)
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
        self._holders.hold(token_ids, engine)

    def _choose(self, prompt: Sequence[int], cost: int) -> int:
        least = min(self._order, key=self._loads.__getitem__)
        holder = self._holders.holder(prompt)
        if holder is None or self._loads[holder] > self._loads[least] + max(cost, SLACK * self._loads[least]):
            return least
        return holder
