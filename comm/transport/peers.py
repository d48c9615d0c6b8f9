"""What the ranks of a lane must have in common before they may join on GPUs (both sides)."""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from torch import distributed as dist

from rollcast.comm.deadline import Deadline

# What a rank's own place decides: these may differ.
OWN_SETTINGS = frozenset({"NCCL_SOCKET_IFNAME", "NCCL_HOSTID", "NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS"})


@dataclass(frozen=True, slots=True)
class Peer:
    """One rank, as the others need to know it."""

    name: str
    """For people: "trainer rank 0", "worker 1 of engine 2"."""
    host: str
    gpu: str
    """UUID of its GPU."""
    nccl: str
    """Version of the NCCL library that is loaded."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Its `NCCL_*` variables."""


class PeerError(ValueError):
    """Ranks that cannot join: it would fail, hang or be wrong later."""


def nccl_settings(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The `NCCL_*` variables that all ranks of a communicator must share."""
    named = {name: value for name, value in environ.items() if name.startswith("NCCL_") and name not in OWN_SETTINGS}
    # Set by container images for their package manager; the library does not read it.
    named.pop("NCCL_VERSION", None)
    return named


def host_name() -> str:
    """Equal for processes of one machine that can map each other's GPU memory."""
    return socket.gethostname()


def meet(store: dist.Store, me: Peer, *, rank: int, size: int, deadline: Deadline) -> list[Peer]:
    """Every rank's peer record, in rank order. Collective; raises torch's `DistStoreError` if one does not come."""
    store.set(f"peer/{rank}", json.dumps(asdict(me)))
    keys = [f"peer/{other}" for other in range(size)]
    store.wait(keys, deadline.left("the records of the lane's other ranks"))
    return [Peer(**json.loads(store.get(key))) for key in keys]


def check_peers(peers: Sequence[Peer]) -> None:
    """Raise `PeerError` naming two ranks that share a GPU, or differ in NCCL's version or settings."""
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
    """Raise `PeerError` naming the first variable that two ranks have set differently, and the ranks."""
    (first, expected), *others = settings.items()
    for other, found in others:
        for name in sorted({*expected, *found}):
            if expected.get(name) != found.get(name):
                raise PeerError(
                    f"{name} is {_shown(expected.get(name))} on {first} and {_shown(found.get(name))} on {other}: "
                    "different NCCL settings can hang a communicator; set it alike on all ranks"
                )


def _shown(value: str | None) -> str:
    return "not set" if value is None else repr(value)
