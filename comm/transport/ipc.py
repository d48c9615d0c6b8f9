"""Broadcasts between processes of one machine that read each other's GPU memory (both sides; needs cupy).

The sender tells where its bytes are, and every receiver copies them: over NVLink between two GPUs, faster than NCCL
does; within one GPU, where NCCL cannot join at all.
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

from rollcast.comm.deadline import Deadline, nap
from rollcast.comm.device.fused_copy import Copies
from rollcast.comm.device.nvml import gpu_uuid
from rollcast.comm.device.storage import aligned
from rollcast.comm.transport.base import Parcel
from rollcast.comm.transport.cuda_event import ASK_S, EventWork
from rollcast.comm.transport.ipc_memory import Offer, Surveyor, check, exportable_bytes
from rollcast.comm.transport.peers import Peer, PeerError, host_name, meet

ACK = b"read"


class IpcGroup:
    """A `Group` of one sender, rank 0, and receivers on the same machine."""

    def __init__(
        self, store: dist.Store, *, rank: int, size: int, deadline: Deadline, device: torch.device, label: str
    ) -> None:
        self.rank = rank
        self.size = size
        self.gentle = False
        self.device = device
        self.closed = False
        me = Peer(label, host_name(), gpu_uuid(device), nccl="")
        self._peers = meet(store, me, rank=rank, size=size, deadline=deadline)
        if apart := [peer for peer in self._peers if peer.host != me.host]:
            raise PeerError(f"{label} and {apart[0].name} are on different machines: set transport to 'nccl'")
        self._stream = torch.cuda.Stream(device)
        self._sockets = listen(store, size, deadline) if rank == 0 else [call(store, rank, deadline)]
        # A descriptor of its own: the socket stays ours, to be shut down from any thread.
        self._lines = [Connection(os.dup(line.fileno())) for line in self._sockets]
        # By address, bytes and number at the sender: where its allocations are here.
        self._mapped: dict[tuple[int, int, int], int] = {}
        self._mapping = threading.Lock()
        self._surveyor = Surveyor()
        # What parcels are noted under.
        self._here = object()
        self._stages: dict[int, torch.Tensor] = {}
        self._unmapped = 0
        self._offered = 0
        self.read = [0] * len(self._lines)
        """Sender: broadcasts that each receiver has read."""

    def broadcast(self, tensors: Sequence[torch.Tensor], *, root: int, deadline: Deadline) -> "OfferWork | ReadWork":
        """See `Group.broadcast`. The root is rank 0."""
        assert root == 0
        if self.closed:
            raise RuntimeError("the weight group is closed")
        deadline.left("a broadcast over CUDA IPC")
        with torch.cuda.device(self.device):
            return self._read(tensors, deadline) if self.rank else self._offer(tensors, deadline)

    def ready(self) -> bool:
        """See `Group.ready`."""
        return self.rank == 0 or self._lines[0].poll(0)

    def release(self) -> None:
        """See `Group.release`."""
        with self._mapping, torch.cuda.device(self.device):
            self._unmap(list(self._mapped))

    def close(self) -> None:
        """See `Group.close`."""
        self.closed = True
        for line in self._sockets:
            # Wakes whoever waits at the other end, and here.
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        self.release()

    def left_by(self) -> None:
        """The sender is heard of through its line."""

    def take(self, line: int, *, what: str, deadline: Deadline) -> bytes:
        """The next message of a peer. Raises `RuntimeError` if it has left."""
        peer, start = self._peer(line), time.perf_counter()
        try:
            while not self._lines[line].poll(0):
                if self.closed:
                    raise RuntimeError(f"the weight group was closed while {what} was under way")
                deadline.left(f"{what} ({peer})")
                nap(start, gentle=self.gentle)
            return self._lines[line].recv_bytes()
        except (EOFError, OSError):
            raise RuntimeError(f"{peer} left the weight group while {what} was under way") from None

    def tell(self, line: int, message: bytes) -> None:
        """Send a message to a peer. Raises `RuntimeError` if it has left."""
        try:
            self._lines[line].send_bytes(message)
        except OSError:
            raise RuntimeError(f"{self._peer(line)} left the weight group") from None

    def _peer(self, line: int) -> str:
        return self._peers[line + 1 if self.rank == 0 else 0].name

    def _offer(self, tensors: Sequence[torch.Tensor], deadline: Deadline) -> "OfferWork":
        parcel = tensors if isinstance(tensors, Parcel) else None
        known: tuple[bytes, Offer] | None = None if parcel is None else parcel.known(self._here)
        message = known[0] if known else self._message(tensors, deadline)
        # Other processes know nothing of this one's streams: what is offered must be there.
        torch.cuda.current_stream(self.device).synchronize()
        for line in range(len(self._lines)):
            self.tell(line, message)
        self._offered += 1
        return OfferWork(self, self._offered, again=parcel if known else None)

    def _message(self, tensors: Sequence[torch.Tensor], deadline: Deadline) -> bytes:
        """The offer of these tensors, or of copies of them. That of a parcel is noted, and used again."""
        offer = self._surveyor.offer(tensors)
        if offer is None:
            offer = self._surveyor.offer(self._staged(tensors, deadline))
            assert offer is not None
            return msgspec.msgpack.encode(offer)
        message = msgspec.msgpack.encode(offer)
        if isinstance(tensors, Parcel):
            tensors.note = (self._here, (message, offer))
        return message

    def check(self, parcel: Parcel) -> None:
        """Raises `RuntimeError` if a parcel that was offered again lies in other memory by now."""
        note, parcel.note = parcel.note, None
        if note is not None:
            check(note[1][1])
        parcel.note = note

    def _staged(self, tensors: Sequence[torch.Tensor], deadline: Deadline) -> list[torch.Tensor]:
        """Copies in memory that can be mapped, one after the other. Two stages are used in turn."""
        # The stage is free when the broadcast before the last has been read.
        OfferWork(self, self._offered - 1).wait(deadline)
        slot, sizes = self._offered % 2, [aligned(tensor.numel()) for tensor in tensors]
        if slot not in self._stages or self._stages[slot].numel() < sum(sizes):
            self._stages[slot] = exportable_bytes(sum(sizes))
        rooms = self._stages[slot][: sum(sizes)].split(sizes)
        copies = [room[: tensor.numel()] for room, tensor in zip(rooms, tensors, strict=True)]
        torch._foreach_copy_(copies, list(tensors))
        return copies

    def _read(self, tensors: Sequence[torch.Tensor], deadline: Deadline) -> "ReadWork":
        message = self.take(0, what="a broadcast over CUDA IPC", deadline=deadline)
        # What is written may be in use by earlier work of the current stream.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._mapping:
            if self.closed:
                raise RuntimeError("the weight group is closed")
            self._copies(tensors, message).run(gentle=self.gentle)
        done = torch.cuda.Event()
        done.record(self._stream)
        return ReadWork(self, done)

    def _copies(self, tensors: Sequence[torch.Tensor], message: bytes) -> Copies:
        """What an offer asks for. It is the same for a parcel at every sync, if the sender's memory is."""
        when = self._here, message, self._unmapped
        if isinstance(tensors, Parcel) and (known := tensors.known(when)):
            return known
        offer = msgspec.msgpack.decode(message, type=Offer)
        if [nbytes for _, _, nbytes in offer.parts] != [tensor.numel() for tensor in tensors]:
            raise RuntimeError("the sender offers other tensors than this side expects")
        bases = [self._map(*allocation) for allocation in offer.allocations]
        pairs = zip(tensors, offer.parts, strict=True)
        places = [(tensor.data_ptr(), bases[place] + start, nbytes) for tensor, (place, start, nbytes) in pairs]
        copies = Copies(places, device=self.device, stream=self._stream)
        if isinstance(tensors, Parcel):
            # Mapping may have unmapped what was there before.
            tensors.note = ((self._here, message, self._unmapped), copies)
        return copies

    def _map(self, handle: bytes, start: int, nbytes: int, number: int) -> int:
        """The address here of an allocation of the sender's."""
        key = start, nbytes, number
        if key not in self._mapped:
            # Of memory that the sender has freed since, and which CUDA would not map a second time.
            self._unmap([old for old in self._mapped if old[0] < start + nbytes and start < old[0] + old[1]])
            self._mapped[key] = runtime.ipcOpenMemHandle(handle)
        return self._mapped[key]

    def _unmap(self, keys: Sequence[tuple[int, int, int]]) -> None:
        if keys:
            self._unmapped += 1
            self._stream.synchronize()
        for key in keys:
            runtime.ipcCloseMemHandle(self._mapped.pop(key))


class OfferWork:
    """The sender's side of a broadcast: over when every receiver has read it."""

    def __init__(self, group: IpcGroup, number: int, *, again: Parcel | None = None) -> None:
        self._group = group
        self._number = number
        self._again = again

    def wait(self, deadline: Deadline) -> None:
        """See `Work.wait`."""
        if self._again is not None:
            # Now, while it is read: asking takes a while.
            self._group.check(self._again)
        for line in range(len(self._group.read)):
            while self._group.read[line] < self._number:
                self._group.take(line, what="a broadcast over CUDA IPC", deadline=deadline)
                self._group.read[line] += 1


class ReadWork(EventWork):
    """A receiver's side: over when its copies are, which the sender is told."""

    def __init__(self, group: IpcGroup, done: torch.cuda.Event) -> None:
        super().__init__(done, what="a broadcast over CUDA IPC", group=group)
        self._reader = group

    def wait(self, deadline: Deadline) -> None:
        """See `Work.wait`."""
        super().wait(deadline)
        self._reader.tell(0, ACK)


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
