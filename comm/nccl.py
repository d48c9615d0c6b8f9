"""Broadcasts between GPUs over NCCL, on communicators and streams of our own (both sides; needs cupy)."""

import threading
import time
from collections.abc import Sequence

import torch
from cupy.cuda import nccl  # pyright: ignore[reportMissingImports]  (CUDA machines only)
from torch import distributed as dist

from rollcast.comm.deadline import Deadline

POLL_S = 20e-6


class NcclWork:
    """One grouped NCCL broadcast under way."""

    def __init__(self, group: "NcclGroup", done: torch.cuda.Event) -> None:
        self._group = group
        self._done = done

    def wait(self, deadline: Deadline) -> None:
        """See `Work.wait`. The host waits too: only it can tell a slow peer from a lost one."""
        while not self._done.query():
            if self._group.closed:
                raise RuntimeError("the NCCL group was closed while a broadcast was under way")
            deadline.left("an NCCL broadcast")
            time.sleep(POLL_S)
        torch.cuda.current_stream(self._group.device).wait_event(self._done)


class NcclGroup:
    """A `Group` over NCCL. The default process group is not touched."""

    def __init__(self, store: dist.Store, *, rank: int, size: int, deadline: Deadline, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self._store = store
        self._stream = torch.cuda.Stream(device)
        self._communicator = self._join(deadline)

    @property
    def closed(self) -> bool:
        """Whether this rank has left."""
        return self._communicator is None

    def broadcast(self, tensors: Sequence[torch.Tensor], *, root: int, deadline: Deadline) -> NcclWork:
        """See `Group.broadcast`."""
        communicator = self._communicator
        if communicator is None:
            raise RuntimeError("the weight group is closed")
        deadline.left("an NCCL broadcast")
        # The tensors were written (or last read) on the current stream; the broadcast must not overtake that.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        nccl.groupStart()
        try:
            for tensor in tensors:
                communicator.bcast(tensor.data_ptr(), tensor.nbytes, nccl.NCCL_UINT8, root, self._stream.cuda_stream)
        finally:
            nccl.groupEnd()
        done = torch.cuda.Event()
        done.record(self._stream)
        return NcclWork(self, done)

    def close(self) -> None:
        """See `Group.close`."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.abort()

    def _join(self, deadline: Deadline) -> nccl.NcclCommunicator | None:
        """Create the communicator on a thread: it blocks for as long as a peer is missing."""
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
        thread.join(deadline.left_s())
        if failed:
            raise failed[0]
        if not joined:
            raise TimeoutError(f"NCCL rank {self.rank} of {self.size} waited in vain for its peers to join")
        return joined[0]
