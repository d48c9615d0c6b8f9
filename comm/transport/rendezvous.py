"""How the ranks of a weight group find each other (both sides).

A weight group is separate from torch's default process group. Rank 0 hosts a store on a free port; its address reaches
the other ranks over the control plane.
"""

import socket
from datetime import timedelta

import torch
from torch import distributed as dist

from rollcast.comm.deadline import Deadline
from rollcast.comm.transport.base import Group
from rollcast.comm.transport.gloo import GlooGroup
from rollcast.comm.transport.sockets import connect_socket, split_address

TRANSPORTS = ("gloo", "nccl", "ipc")


def host_store(host: str, *, timeout_s: float) -> tuple[dist.TCPStore, str]:
    """Host a store on a free port of this machine; return it and the address `host:port` for the peers."""
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    return store, f"{host}:{store.port}"


def connect_store(address: str, deadline: Deadline) -> dist.TCPStore:
    """Connect to a hosted store. Raises `OSError` at once if nobody listens at `address` any more."""
    # torch itself retries a refused connection until long after its timeout.
    connect_socket(address, deadline).close()
    timeout = deadline.left("the weight group's store")
    return dist.TCPStore(*split_address(address), is_master=False, timeout=timeout)


def join_group(
    transport: str,
    store: dist.Store | str,
    *,
    rank: int,
    size: int,
    deadline: Deadline,
    device: torch.device | None = None,
    name: str = "weights",
    label: str = "",
) -> Group:
    """Join the group as `rank` of `size`. Collective; every rank passes the same `transport` and `name`.

    `transport` is "gloo", "nccl" or "ipc". `store` is the hosted store or its address; groups of different names can
    share one. `device` is this rank's GPU (not used by gloo); errors name this rank by its `label`. Raises `PeerError`
    for ranks that must not be joined, `TimeoutError` or torch's `DistStoreError` when a peer does not join within the
    deadline.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"unknown transport {transport!r}, expected one of {', '.join(TRANSPORTS)}")
    if isinstance(store, str):
        store = connect_store(store, deadline)
    scoped = dist.PrefixStore(name, store)
    if transport == "gloo":
        return GlooGroup(scoped, rank=rank, size=size, deadline=deadline)
    assert device is not None
    # These import cupy, which only CUDA machines have.
    if transport == "ipc":
        from rollcast.comm.transport.ipc import IpcGroup as DeviceGroup
    else:
        from rollcast.comm.transport.nccl import NcclGroup as DeviceGroup
    label = label or f"rank {rank} of {name}"
    return DeviceGroup(scoped, rank=rank, size=size, deadline=deadline, device=device, label=label)


def reachable_host(towards: str) -> str:
    """Return this machine's IPv4 address on the route to the host `towards`. No packet is sent."""
    *_, address = socket.getaddrinfo(towards, 9, family=socket.AF_INET, type=socket.SOCK_DGRAM)[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
