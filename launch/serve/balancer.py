"""Which engine an HTTP request goes to (rank 0 of the serve job)."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rollcast.rollout.pool import PrefixHolders

# About 16 tokens, vLLM's block: shorter beginnings are not in its prefix cache either.
BLOCK_CHARS = 64
# How many requests more than the least loaded engine the holder of a prefix may have: this many, or this share.
SLACK_REQUESTS = 2
SLACK_SHARE = 0.25
# How long an engine that could not be reached, or refused, comes last.
AVOID_S = 5.0
# What a prompt is rendered from, in the order in which chat templates write it.
PROMPT_FIELDS = ("model", "tools", "instructions", "messages", "input", "prompt")


class Balancer:
    """Chooses the engine with the fewest requests, or one that holds a request's beginning and is not far behind.

        for engine in balancer.candidates(prefix):      # the best first
            with balancer.request(engine, prefix): ...

    Counts this server's requests alone. Not thread-safe.
    """

    def __init__(self, engines: int) -> None:
        self._loads = [0] * engines
        self._holders = PrefixHolders(block=BLOCK_CHARS)
        self._avoided_until = [0.0] * engines

    @property
    def loads(self) -> tuple[int, ...]:
        """Requests of each engine."""
        return tuple(self._loads)

    def candidates(self, prefix: str) -> list[int]:
        """Return all engines in the order in which to try them. `prefix` is what `prompt_prefix` returns."""
        engines = sorted(range(len(self._loads)), key=self._loads.__getitem__)
        least = self._loads[engines[0]]
        holder = self._holders.holder(prefix)
        if holder is not None and self._loads[holder] <= least + max(SLACK_REQUESTS, SLACK_SHARE * least):
            engines.remove(holder)
            engines.insert(0, holder)
        now = time.monotonic()
        return sorted(engines, key=lambda engine: self._avoided_until[engine] > now)

    @contextmanager
    def request(self, engine: int, prefix: str) -> Iterator[None]:
        """Count a request for as long as the context is open; later ones with the same beginning prefer the engine."""
        self._loads[engine] += 1
        self._holders.hold(prefix, engine)
        try:
            yield
        finally:
            self._loads[engine] -= 1

    def avoid(self, engine: int) -> None:
        """Try this engine last for a while: it could not be reached, or refused."""
        self._avoided_until[engine] = time.monotonic() + AVOID_S


def prompt_prefix(body: bytes) -> str:
    """Return the text of a request that its prompt is rendered from; empty if the body is not a JSON object.

    The text of a conversation's next turn begins with that of the turn before, less its last few characters.
    """
    try:
        content = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(content, dict):
        return ""
    return json.dumps([content[field] for field in PROMPT_FIELDS if field in content])
