"""Sockets between trainers and engines: messages are a length, then the bytes (trainer, engine process, workers).

Plain sockets: a library with a thread of its own adds two wake-ups to every hop, which cost more than the hop, and a
sync of a small model is over in a few milliseconds.
"""

import asyncio
import contextlib
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from multiprocessing.connection import Connection

from rollcast.comm import Deadline
from rollcast.comm.transport.sockets import connect_socket

# The framing of `multiprocessing.connection`, which sends messages of up to 2 GiB so.
HEAD = struct.Struct("!i")
# Size of the engine's read buffer.
LIMIT_BYTES = 1 << 20
# Size of the number before each request and its reply.
ID_BYTES = 8
# Longest wait for a process that listens, as its address says, to accept a connection.
CONNECT_TIMEOUT_S = 30.0


def frame(*parts: bytes) -> bytes:
    """Return one message made of these parts."""
    return b"".join((HEAD.pack(sum(map(len, parts))), *parts))


async def frames(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield messages until the connection ends."""
    try:
        while True:
            (size,) = HEAD.unpack(await reader.readexactly(HEAD.size))
            yield await reader.readexactly(size)
    except (asyncio.IncompleteReadError, OSError):
        return


class EngineConnection:
    """A trainer's connection to an engine process. `send` and `close` may be called from any thread."""

    def __init__(self, address: str) -> None:
        """Raise `OSError`, with the address, if the engine cannot be reached within `CONNECT_TIMEOUT_S`."""
        try:
            self._socket = connect_socket(address, Deadline(CONNECT_TIMEOUT_S))
        except OSError as error:
            raise OSError(f"the engine at {address} cannot be reached: {error}") from None
        # A file descriptor of its own: the socket stays ours, to be shut down from any thread.
        self._connection = Connection(os.dup(self._socket.fileno()))
        self._sending = threading.Lock()

    def send(self, frames: bytes) -> None:
        """Send whole messages; do nothing if the engine has ended."""
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(frames)

    def messages(self) -> Iterator[bytes]:
        """Yield the engine's messages until the connection ends."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                yield self._connection.recv_bytes()

    def close(self) -> None:
        """Shut the connection down, which ends `messages`. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
