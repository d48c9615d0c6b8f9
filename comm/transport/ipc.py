"""Broadcasts between processes of one machine that read each other's GPU memory (both sides; needs cupy).

The sender sends every receiver a description of its buffers over a local connection; the receivers map them and copy:
over NVLink between two GPUs, faster than NCCL; within one GPU, where NCCL cannot join at all.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import msgspec
import torch
from cupy.cuda import runtime  # pyright: ignore[reportMissingImports]  (CUDA machines only)
from torch import distributed as dist

from rollcast.comm.deadline import Deadline, poll_sleep
from rollcast.comm.device.fused_copy import GraphCopy
from rollcast.comm.device.nvml import gpu_uuid
from rollcast.comm.device.storage import aligned
from rollcast.comm.transport.base import PersistentTensors, TensorError
from rollcast.comm.transport.cuda_event import PEER_CHECK_S, EventWork
from rollcast.comm.transport.ipc_memory import HandleCache, IpcBuffers, check_allocations, exportable_bytes
from rollcast.comm.transport.peers import Peer, PeerError, exchange_peers, host_name
from rollcast.comm.transport.sockets import connect_socket, disable_nagle

ACK = b"read"
BROADCAST = "a broadcast over CUDA IPC"
# Store key: the port on which the sender accepts its receivers.
SENDER_PORT = "sender_port"


class IpcGroup:
    """A `Group` of one sender, rank 0, and receivers on the same machine."""

    def __init__(
        self, store: dist.Store, *, rank: int, size: int, deadline: Deadline, device: torch.device, label: str
    ) -> None:
        self.rank = rank
        self.size = size
        self.low_priority = False
        self.device = device
        self.closed = False
        me = Peer(label, host_name(), gpu_uuid(device), nccl="")
        self._peers = exchange_peers(store, me, rank=rank, size=size, deadline=deadline)
        if remote := [peer for peer in self._peers if peer.host != me.host]:
            raise PeerError(f"{label} and {remote[0].name} are on different machines: set transport to 'nccl'")
        self._stream = torch.cuda.Stream(device)
        if rank == 0:
            self._sockets = accept_receivers(store, size, deadline)
        else:
            self._sockets = [connect_to_sender(store, rank, deadline)]
        # On duplicated descriptors: `close` shuts the sockets themselves down, from any thread.
        self._connections = [Connection(os.dup(each.fileno())) for each in self._sockets]
        # (address at the sender, bytes, `Allocation.number`) -> address here.
        self._mapped: dict[tuple[int, int, int], int] = {}
        # Held while memory is mapped, unmapped, or read by copies being launched: `close` comes from any thread.
        self._mapping = threading.Lock()
        self._unmap_count = 0
        self._handles = HandleCache()
        # Key of what this group stores in `PersistentTensors`: they may outlive it.
        self._cache_key = object()
        self._staging: dict[int, torch.Tensor] = {}
        self._broadcasts = 0
        self.acknowledged = [0] * len(self._connections)
        """Sender: broadcasts that each receiver has read."""

    def broadcast(self, tensors: Sequence[torch.Tensor], *, root: int, deadline: Deadline) -> "SendWork | ReadWork":
        """See `Group.broadcast`. The root is rank 0."""
        assert root == 0
        if self.closed:
            raise RuntimeError("the weight group is closed")
        deadline.left(BROADCAST)
        with torch.cuda.device(self.device):
            return self._read(tensors, deadline) if self.rank else self._send(tensors, deadline)

    def ready(self) -> bool:
        """See `Group.ready`."""
        return self.rank == 0 or self._connections[0].poll(0)

    def unmap(self) -> None:
        """See `Group.unmap`."""
        with self._mapping, torch.cuda.device(self.device):
            self._unmap(list(self._mapped))

    def close(self) -> None:
        """See `Group.close`."""
        self.closed = True
        for each in self._sockets:
            # Ends every wait on the connection, at the other end and here.
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self.unmap()

    def departed_peer(self) -> None:
        """See `LeavableGroup`. None: that a peer has left shows on its connection."""

    def receive_message(self, connection: int, *, deadline: Deadline) -> bytes:
        """Return the next message of a peer. Raises `RuntimeError` if it has left."""
        peer, start = self._peer_name(connection), time.perf_counter()
        try:
            while not self._connections[connection].poll(0):
                if self.closed:
                    raise RuntimeError(f"the weight group was closed while {BROADCAST} was under way")
                deadline.left(f"{BROADCAST} ({peer})")
                poll_sleep(start, low_priority=self.low_priority)
            return self._connections[connection].recv_bytes()
        except (EOFError, OSError):
            raise RuntimeError(f"{peer} left the weight group while {BROADCAST} was under way") from None

    def send_message(self, connection: int, message: bytes) -> None:
        """Send a message to a peer. Raises `RuntimeError` if it has left."""
        try:
            self._connections[connection].send_bytes(message)
        except OSError:
            raise RuntimeError(f"{self._peer_name(connection)} left the weight group") from None

    def check_memory(self, tensors: PersistentTensors) -> None:
        """Raise `RuntimeError` if tensors whose description was sent again are in other memory by now."""
        # Not stored again if the check fails: the next broadcast describes them anew.
        described: tuple[bytes, IpcBuffers] | None = tensors.pop_cached()
        if described is not None:
            check_allocations(described[1])
            tensors.cache(self._cache_key, described)

    def _peer_name(self, connection: int) -> str:
        return self._peers[connection + 1 if self.rank == 0 else 0].name

    def _send(self, tensors: Sequence[torch.Tensor], deadline: Deadline) -> "SendWork":
        persistent = tensors if isinstance(tensors, PersistentTensors) else None
        known: tuple[bytes, IpcBuffers] | None = None if persistent is None else persistent.cached(self._cache_key)
        message = known[0] if known else self._describe(tensors, deadline)
        # Other processes do not wait for this one's streams: the bytes must be there before they receive
        # their description.
        torch.cuda.current_stream(self.device).synchronize()
        for connection in range(len(self._connections)):
            self.send_message(connection, message)
        self._broadcasts += 1
        return SendWork(self, self._broadcasts, reused=persistent if known else None)

    def _describe(self, tensors: Sequence[torch.Tensor], deadline: Deadline) -> bytes:
        """Return the encoded `IpcBuffers` of the tensors, or of copies of them; keep those of `PersistentTensors`."""
        buffers = self._handles.describe(tensors)
        if buffers is None:
            buffers = self._handles.describe(self._staged(tensors, deadline))
            assert buffers is not None
            return msgspec.msgpack.encode(buffers)
        message = msgspec.msgpack.encode(buffers)
        if isinstance(tensors, PersistentTensors):
            tensors.cache(self._cache_key, (message, buffers))
        return message

    def _staged(self, tensors: Sequence[torch.Tensor], deadline: Deadline) -> list[torch.Tensor]:
        """Copy the tensors, one after the other, into memory that can be mapped. Two such buffers are used in turn."""
        # The buffer is free when the broadcast before the last has been read.
        SendWork(self, self._broadcasts - 1).wait(deadline)
        slot, sizes = self._broadcasts % 2, [aligned(tensor.numel()) for tensor in tensors]
        if slot not in self._staging or self._staging[slot].numel() < sum(sizes):
            self._staging[slot] = exportable_bytes(sum(sizes))
        slices = self._staging[slot][: sum(sizes)].split(sizes)
        copies = [part[: tensor.numel()] for part, tensor in zip(slices, tensors, strict=True)]
        torch._foreach_copy_(copies, list(tensors))
        return copies

    def _read(self, tensors: Sequence[torch.Tensor], deadline: Deadline) -> "ReadWork":
        message = self.receive_message(0, deadline=deadline)
        # The targets may be in use by earlier work of the current stream.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._mapping:
            if self.closed:
                raise RuntimeError("the weight group is closed")
            self._copies(tensors, message).run(low_priority=self.low_priority)
        done = torch.cuda.Event()
        done.record(self._stream)
        return ReadWork(self, done)

    def _copies(self, tensors: Sequence[torch.Tensor], message: bytes) -> GraphCopy:
        """Return the copies out of the buffers that `message` describes.

        Those of `PersistentTensors` are kept and used again while the sender's memory is the same and still mapped.
        """
        key = self._cache_key, message, self._unmap_count
        if isinstance(tensors, PersistentTensors) and (known := tensors.cached(key)):
            return known
        buffers = msgspec.msgpack.decode(message, type=IpcBuffers)
        sizes = [nbytes for _, _, nbytes in buffers.parts]
        if len(sizes) != len(tensors):
            raise RuntimeError(f"the sender broadcasts {len(sizes)} tensors, and this rank expects {len(tensors)}")
        for index, (nbytes, tensor) in enumerate(zip(sizes, tensors, strict=True)):
            if nbytes != tensor.numel():
                raise TensorError(index, f"the sender has {nbytes} bytes, and this rank expects {tensor.numel()}")
        bases = [self._map(*allocation) for allocation in buffers.allocations]
        pairs = zip(tensors, buffers.parts, strict=True)
        reads = [(tensor.data_ptr(), bases[index] + first, nbytes) for tensor, (index, first, nbytes) in pairs]
        copies = GraphCopy(reads, device=self.device, stream=self._stream)
        if isinstance(tensors, PersistentTensors):
            # Not under `key`: mapping may have unmapped memory that the sender has freed.
            tensors.cache((self._cache_key, message, self._unmap_count), copies)
        return copies

    def _map(self, handle: bytes, start: int, nbytes: int, number: int) -> int:
        """Return the address here of one of the sender's allocations, mapping it if it is not."""
        key = start, nbytes, number
        if key not in self._mapped:
            # Allocations at the same addresses are freed ones; CUDA does not map the new one beside them.
            self._unmap([old for old in self._mapped if old[0] < start + nbytes and start < old[0] + old[1]])
            self._mapped[key] = runtime.ipcOpenMemHandle(handle)
        return self._mapped[key]

    def _unmap(self, keys: Sequence[tuple[int, int, int]]) -> None:
        if keys:
            self._unmap_count += 1
            # Copies that read this memory may still be under way.
            self._stream.synchronize()
        for key in keys:
            runtime.ipcCloseMemHandle(self._mapped.pop(key))


class SendWork:
    """The sender's side of a broadcast: done when every receiver has read it."""

    def __init__(self, group: IpcGroup, number: int, *, reused: PersistentTensors | None = None) -> None:
        self._group = group
        self._number = number
        self._reused = reused

    def wait(self, deadline: Deadline) -> None:
        """See `Work.wait`. Raises `RuntimeError` too if the tensors were given other memory at the same address."""
        if self._reused is not None:
            # Here, while the receivers read: the driver takes a while to answer.
            self._group.check_memory(self._reused)
        for connection in range(len(self._group.acknowledged)):
            while self._group.acknowledged[connection] < self._number:
                self._group.receive_message(connection, deadline=deadline)
                self._group.acknowledged[connection] += 1


class ReadWork(EventWork):
    """A receiver's side of a broadcast: done when its copies are, which it then acknowledges."""

    def __init__(self, group: IpcGroup, done: torch.cuda.Event) -> None:
        super().__init__(done, what=BROADCAST, group=group)
        self._ipc_group = group

    def wait(self, deadline: Deadline) -> None:
        """See `Work.wait`."""
        super().wait(deadline)
        self._ipc_group.send_message(0, ACK)


def accept_receivers(store: dist.Store, size: int, deadline: Deadline) -> list[socket.socket]:
    """Return the sender's connections to its receivers, in rank order."""
    with socket.create_server(("127.0.0.1", 0), backlog=size) as server:
        store.set(SENDER_PORT, str(server.getsockname()[1]))
        by_rank: dict[int, socket.socket] = {}
        server.settimeout(PEER_CHECK_S)
        while len(by_rank) < size - 1:
            timeout = deadline.left("the receivers of a lane")
            try:
                accepted, _ = server.accept()
            except TimeoutError:
                # Raises when the store has gone: its host has given up, so the group will never be complete.
                store.check([SENDER_PORT])
                continue
            accepted.settimeout(timeout.total_seconds())
            by_rank[int.from_bytes(accepted.recv(4, socket.MSG_WAITALL), "big")] = accepted
    for each in by_rank.values():
        each.settimeout(None)
        disable_nagle(each)
    return [by_rank[rank] for rank in range(1, size)]


def connect_to_sender(store: dist.Store, rank: int, deadline: Deadline) -> socket.socket:
    """Return a receiver's connection to the sender."""
    store.wait([SENDER_PORT], deadline.left("the sender of a lane"))
    connection = connect_socket(f"127.0.0.1:{int(store.get(SENDER_PORT))}", deadline)
    connection.sendall(rank.to_bytes(4, "big"))
    return connection
