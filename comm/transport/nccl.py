"""Broadcasts between GPUs over NCCL, on communicators and streams of our own (both sides; needs cupy)."""

import contextlib
import threading
from collections.abc import Sequence

import torch
from cupy.cuda import nccl  # pyright: ignore[reportMissingImports]  (CUDA machines only)
from torch import distributed as dist

from rollcast.comm.deadline import Deadline
from rollcast.comm.device.nvml import gpu_uuid
from rollcast.comm.transport.cuda_event import PEER_CHECK_S, EventWork
from rollcast.comm.transport.peers import Peer, check_peers, exchange_peers, host_name, nccl_settings

# Store key: the name of the rank that has left.
LEFT = "left"


class NcclGroup:
    """A `Group` over NCCL. The default process group is not touched."""

    def __init__(
        self, store: dist.Store, *, rank: int, size: int, deadline: Deadline, device: torch.device, label: str
    ) -> None:
        self.rank = rank
        self.size = size
        self.low_priority = False
        self.device = device
        self.closed = False
        self._store = store
        version = ".".join(map(str, divmod(nccl.get_version() // 100, 100))) + f".{nccl.get_version() % 100}"
        self._me = me = Peer(label, host_name(), gpu_uuid(device), version, nccl_settings())
        check_peers(exchange_peers(store, me, rank=rank, size=size, deadline=deadline))
        self._stream = torch.cuda.Stream(device)
        self._communicator = self._join(deadline)

    def broadcast(self, tensors: Sequence[torch.Tensor], *, root: int, deadline: Deadline) -> EventWork:
        """See `Group.broadcast`."""
        communicator = self._communicator
        if communicator is None:
            raise RuntimeError("the weight group is closed")
        deadline.left("an NCCL broadcast")
        # The tensors were written (or last read) on the current stream; the broadcast must not overtake that.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        stream, uint8, bcast = self._stream.cuda_stream, nccl.NCCL_UINT8, communicator.bcast
        nccl.groupStart()
        try:
            for tensor in tensors:
                bcast(tensor.data_ptr(), tensor.numel(), uint8, root, stream)
        finally:
            nccl.groupEnd()
        done = torch.cuda.Event()
        done.record(self._stream)
        return EventWork(done, what="an NCCL broadcast", group=self)

    def departed_peer(self) -> str | None:
        """See `LeavableGroup`. NCCL itself would let the others wait for that rank."""
        return self._store.get(LEFT).decode() if self._store.check([LEFT]) else None

    def ready(self) -> bool:
        """See `Group.ready`."""
        return True

    def unmap(self) -> None:
        """See `Group.unmap`."""

    def close(self) -> None:
        """See `Group.close`."""
        self.closed = True
        # The store is unreachable only when the rank that hosts it has gone: then nobody is left to notify.
        with contextlib.suppress(RuntimeError):
            self._store.set(LEFT, self._me.name)
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.abort()

    def _join(self, deadline: Deadline) -> nccl.NcclCommunicator | None:
        """Create the communicator, on a thread of its own: the call blocks for as long as a peer is missing."""
        joined: list[nccl.NcclCommunicator] = []
        failed: list[BaseException] = []

        def create() -> None:
            try:
                if self.rank == 0:
                    self._store.set("nccl_id", nccl.get_unique_id().hex())
                self._store.wait(["nccl_id"], deadline.left("rank 0's NCCL id"))
                unique_id = bytes.fromhex(self._store.get("nccl_id").decode())
                with torch.cuda.device(self.device):
                    joined.append(nccl.NcclCommunicator(self.size, unique_id, self.rank))
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=create, name="nccl-join", daemon=True)
        thread.start()
        while thread.is_alive() and deadline.left_s():
            thread.join(min(PEER_CHECK_S, deadline.left_s()))
            # Raises when the store has gone: its host has given up, so the group will never be complete.
            self._store.check(["nccl_id"])
        if failed:
            raise failed[0]
        if not joined:
            raise TimeoutError(f"NCCL rank {self.rank} of {self.size} timed out waiting for its peers to join")
        return joined[0]
