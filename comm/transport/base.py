"""The weight group: its rendezvous and the one interface that its transports share.

A group is separate from torch's default process group. Rank 0 hosts the store on a free port; the address
reaches the other ranks over the control plane.
"""

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import distributed as dist

from rollcast.comm.deadline import Deadline
from rollcast.comm.transport.gloo import GlooGroup

TRANSPORTS = ("gloo", "nccl", "ipc")


class Parcel(list[torch.Tensor]):
    """Tensors that are broadcast again and again, and stay where they are for as long as this lives."""

    note: tuple[Any, Any] | None = None
    """What a group knows of them: the circumstances under which it holds, and what."""

    def known(self, when: Any) -> Any:
        """What was noted under just these circumstances, else None."""
        return self.note[1] if self.note is not None and self.note[0] == when else None


class Work(Protocol):
    """A grouped broadcast under way."""

    def wait(self, deadline: Deadline) -> None:
        """Block until the tensors may be read (or overwritten, on the root). Raises when a peer is lost."""
        ...


class Group(Protocol):
    """Ranks that share a stream of broadcasts. Every rank issues the same broadcasts in the same order."""

    rank: int
    size: int
    gentle: bool
    """Whether others need this rank's GPU and interpreter meanwhile: then it takes little of them, and more time."""

    def broadcast(self, tensors: Sequence[torch.Tensor], *, root: int, deadline: Deadline) -> Work:
        """Start to copy every tensor (contiguous uint8, not empty) from rank `root` to all others. Collective.

        One grouped collective: both sides pass as many tensors, of the same sizes in the same order. What comes again
        in the next sync is a `Parcel`.
        """
        ...

    def ready(self) -> bool:
        """Whether `broadcast` can start without a wait for the root. (Only some transports wait.)"""
        ...

    def release(self) -> None:
        """Let go of peers' memory that is mapped here, if any. No broadcast may be under way."""
        ...

    def close(self) -> None:
        """Leave the group. Idempotent. Peers that still wait for this rank fail at once instead of hanging."""
        ...


def host_store(host: str, *, timeout_s: float) -> tuple[dist.TCPStore, str]:
    """Host a store on a free port of this machine. Returns it and the address `host:port` that peers use."""
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    return store, f"{host}:{store.port}"


def connect_store(address: str, deadline: Deadline) -> dist.TCPStore:
    """A connection to a hosted store. Raises `OSError` at once if it is no longer there."""
    host, _, port = address.rpartition(":")
    timeout = deadline.left("the weight group's store")
    # torch itself would knock at a closed door until long after its timeout.
    socket.create_connection((host, int(port)), timeout.total_seconds()).close()
    return dist.TCPStore(host, int(port), is_master=False, timeout=timeout)


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

    `store` is the hosted store or its address; groups with different names can share one. `device` is this rank's
    GPU, and `label` says in errors who it is. Raises `PeerError` for ranks that cannot be joined, `TimeoutError` or
    torch's `DistStoreError` when the peers do not come within the deadline.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"unknown transport {transport!r}, expected one of {', '.join(TRANSPORTS)}")
    if isinstance(store, str):
        store = connect_store(store, deadline)
    scoped = dist.PrefixStore(name, store)
    if transport == "gloo":
        return GlooGroup(scoped, rank=rank, size=size, deadline=deadline)
    assert device is not None
    # cupy is only there on CUDA machines.
    if transport == "ipc":
        from rollcast.comm.transport.ipc import IpcGroup as DeviceGroup
    else:
        from rollcast.comm.transport.nccl import NcclGroup as DeviceGroup
    label = label or f"rank {rank} of {name}"
    return DeviceGroup(scoped, rank=rank, size=size, deadline=deadline, device=device, label=label)


def reachable_host(towards: str) -> str:
    """The IPv4 address of this machine on the route to the host `towards` (no packet is sent)."""
    *_, address = socket.getaddrinfo(towards, 9, family=socket.AF_INET, type=socket.SOCK_DGRAM)[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
