"""What the ranks of a lane exchange and compare before they join on GPUs (both sides)."""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from torch import distributed as dist

from rollcast.comm.deadline import Deadline

# Host-specific NCCL settings, which may differ between ranks.
HOST_SETTINGS = frozenset({"NCCL_SOCKET_IFNAME", "NCCL_HOSTID", "NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS"})


@dataclass(frozen=True, slots=True)
class Peer:
    """One rank's record: what the others check before they join it."""

    name: str
    """As errors name it: "trainer rank 0", "worker 1 of engine 2"."""
    host: str
    gpu: str
    """UUID."""
    nccl: str
    """Version of the NCCL library in use; empty where NCCL is not used."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """See `nccl_settings`."""


class PeerError(ValueError):
    """Ranks that must not form a group: it would hang, fail or be wrong later."""


def nccl_settings(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the `NCCL_*` variables that must be the same on all ranks of a communicator."""
    # NCCL_VERSION is set by container images for their package manager; the library does not read it.
    ignored = HOST_SETTINGS | {"NCCL_VERSION"}
    return {name: value for name, value in environ.items() if name.startswith("NCCL_") and name not in ignored}


def host_name() -> str:
    """Return a name that is equal for processes that can map each other's GPU memory."""
    return socket.gethostname()


def exchange_peers(store: dist.Store, me: Peer, *, rank: int, size: int, deadline: Deadline) -> list[Peer]:
    """Publish `me` and return every rank's record, in rank order. Collective.

    Raises torch's `DistStoreError` if a rank does not publish its own before the deadline.
    """
    store.set(f"peer/{rank}", json.dumps(asdict(me)))
    keys = [f"peer/{other}" for other in range(size)]
    store.wait(keys, deadline.left("the records of the lane's other ranks"))
    return [Peer(**json.loads(store.get(key))) for key in keys]


def check_peers(peers: Sequence[Peer]) -> None:
    """Raise `PeerError` naming two ranks that share a GPU, or that differ in NCCL's version or settings."""
    first, *_ = peers
    owners: dict[tuple[str, str], Peer] = {}
    for peer in peers:
        other = owners.setdefault((peer.host, peer.gpu), peer)
        if other is not peer:
            raise PeerError(
                f"{other.name} and {peer.name} share GPU {peer.gpu} on {peer.host}, and NCCL joins one rank a GPU: "
                "give each a GPU of its own, or set colocate=True for engines on the trainers' GPUs"
            )
        if peer.nccl != first.nccl:
            raise PeerError(
                f"{first.name} has NCCL {first.nccl} and {peer.name} has NCCL {peer.nccl}: install one version"
            )
    check_settings({peer.name: peer.settings for peer in peers})


def check_settings(settings: Mapping[str, Mapping[str, str]]) -> None:
    """Raise `PeerError` naming the first variable on which two ranks differ. `settings` is by rank name."""
    (first, expected), *others = settings.items()
    for other, actual in others:
        for name in sorted({*expected, *actual}):
            if expected.get(name) != actual.get(name):
                raise PeerError(
                    f"{name} is {_shown(expected.get(name))} on {first} and {_shown(actual.get(name))} on {other}: "
                    "different NCCL settings can hang a communicator; set it alike on all ranks"
                )


def _shown(value: str | None) -> str:
    return "not set" if value is None else repr(value)
