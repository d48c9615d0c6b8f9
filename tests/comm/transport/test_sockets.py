"""Connections between processes: with a deadline until they are made, and without one from then on."""

import socket
import time
from collections.abc import Iterator

import pytest

from rollcast.comm import Deadline
from rollcast.comm.transport.sockets import connect_socket, split_address
from rollcast.rollout.protocol import connection
from rollcast.rollout.protocol.connection import EngineConnection


@pytest.fixture
def full_server() -> Iterator[str]:
    """The address of a server that accepts nobody and whose queue is full: further connections hang."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(address)
        yield f"{address[0]}:{address[1]}"
        for each in waiting:
            each.close()


def test_an_address_has_a_host_and_a_port() -> None:
    assert split_address("10.0.0.1:80") == ("10.0.0.1", 80)


def test_a_connection_sends_at_once_and_has_no_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connected = connect_socket(f"127.0.0.1:{server.getsockname()[1]}", Deadline(5.0))
        assert connected.gettimeout() is None
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        connected.close()


def test_a_server_that_accepts_nobody_is_given_up(full_server: str) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        connect_socket(full_server, Deadline(0.3))
    assert time.monotonic() - start < 2.0


def test_an_engine_that_accepts_nobody_is_named(full_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_S", 0.3)
    start = time.monotonic()
    with pytest.raises(OSError, match=f"the engine at {full_server} cannot be reached: timed out"):
        EngineConnection(full_server)
    assert time.monotonic() - start < 2.0
