"""Messages on a connection: a length, then the bytes (engine process; the other ends use `Connection`).

Plain sockets: a library with a thread of its own adds two wake-ups to every hop, which cost more than the hop, and a
sync of a small model is over in a few milliseconds.
"""

import asyncio
import struct
from collections.abc import AsyncIterator

# As `multiprocessing.connection` does it, up to 2 GiB.
HEAD = struct.Struct("!i")
LIMIT_BYTES = 1 << 20
# Of the number before each request and its reply.
ID_BYTES = 8


def frame(*parts: bytes) -> bytes:
    """One message, of these parts."""
    return b"".join((HEAD.pack(sum(map(len, parts))), *parts))


async def frames(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Messages, until the connection ends."""
    try:
        while True:
            (size,) = HEAD.unpack(await reader.readexactly(HEAD.size))
            yield await reader.readexactly(size)
    except (asyncio.IncompleteReadError, OSError):
        return
