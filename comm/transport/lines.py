"""Connections between the sender of a lane and its receivers, on one machine (both sides)."""

import socket

from torch import distributed as dist

from rollcast.comm.deadline import Deadline
from rollcast.comm.transport.cuda_event import ASK_S


def listen(store: dist.Store, size: int, deadline: Deadline) -> list[socket.socket]:
    """The sender's lines to its receivers, in the order of their ranks."""
    with socket.create_server(("127.0.0.1", 0), backlog=size) as server:
        store.set("line", str(server.getsockname()[1]))
        lines: dict[int, socket.socket] = {}
        server.settimeout(ASK_S)
        while len(lines) < size - 1:
            timeout = deadline.left("the receivers of a lane")
            try:
                line, _ = server.accept()
            except TimeoutError:
                # Raises when the store is gone: somebody has given up, and nobody will come.
                store.check(["line"])
                continue
            line.settimeout(timeout.total_seconds())
            lines[int.from_bytes(line.recv(4, socket.MSG_WAITALL), "big")] = line
    for line in lines.values():
        _make_ready(line)
    return [lines[rank] for rank in range(1, size)]


def call(store: dist.Store, rank: int, deadline: Deadline) -> socket.socket:
    """A receiver's line to the sender."""
    store.wait(["line"], deadline.left("the sender of a lane"))
    timeout_s = deadline.left("the sender of a lane").total_seconds()
    line = socket.create_connection(("127.0.0.1", int(store.get("line"))), timeout_s)
    line.sendall(rank.to_bytes(4, "big"))
    _make_ready(line)
    return line


def _make_ready(line: socket.socket) -> None:
    line.settimeout(None)
    # Or the second small message in a row would wait for the peer's delayed acknowledgement of the first: 40 ms.
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
