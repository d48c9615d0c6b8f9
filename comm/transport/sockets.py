"""TCP connections between the processes of a job (every process)."""

import socket

from rollcast.comm.deadline import Deadline


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of an address `host:port`."""
    host, _, port = address.rpartition(":")
    return host, int(port)


def connect_socket(address: str, deadline: Deadline) -> socket.socket:
    """Connect to `host:port`. Later calls of the socket have no timeout, and small messages leave at once.

    Raises `OSError` if nobody listens there, and its subclass `TimeoutError` if nobody accepts before the deadline.
    """
    timeout_s = deadline.left(f"a connection to {address}").total_seconds()
    connection = socket.create_connection(split_address(address), timeout_s)
    connection.settimeout(None)
    disable_nagle(connection)
    return connection


def disable_nagle(connection: socket.socket) -> None:
    """Let small messages leave at once.

    Else the second in a row would wait for the peer's delayed acknowledgement of the first: 40 ms.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
