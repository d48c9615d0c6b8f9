"""What workers report while they receive beside decoding: their replies to the call would come too early."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio


class Asides:
    """Collects the reports (engine process).

    address = asides.begin()          # for the workers
    phases = await asides.collect(number of workers, timeout_s=60)
    """

    def __init__(self) -> None:
        self._socket: zmq.asyncio.Socket | None = None
        self._number = 0

    def begin(self) -> tuple[str, int]:
        """Address and number of a new round; reports of earlier ones are ignored."""
        if self._socket is None:
            self._socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
            self._socket.bind("tcp://127.0.0.1:*")
        self._number += 1
        return self._socket.get_string(zmq.LAST_ENDPOINT), self._number

    async def collect(self, workers: int, *, timeout_s: float) -> list[dict[str, float]]:
        """Each worker's seconds by phase, in the order of their ranks.

        Raises `RuntimeError` with a worker's own words if it failed, `TimeoutError`.
        """
        assert self._socket is not None
        phases: dict[int, dict[str, float]] = {}
        async with asyncio.timeout(timeout_s):
            while len(phases) < workers:
                number, rank, problem, its = msgspec.msgpack.decode(await self._socket.recv())
                if number == self._number and problem:
                    raise RuntimeError(problem)
                if number == self._number:
                    phases[rank] = its
        return [phases[rank] for rank in sorted(phases)]


def report(place: Sequence[Any], rank: int, problem: str, phases_s: dict[str, Any]) -> None:
    """Tell the engine process how it went; `place` is what `begin` has returned (worker)."""
    address, number = place
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(address)
        socket.send(msgspec.msgpack.encode([number, rank, problem, phases_s]))
