"""The methods of updating an engine's weights that are compared (trainer).

Each is a context manager that yields the update to time; groups and communicators are created before.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from latency.bench import RPC_TIMEOUT_S, Bench, Run, Sample, result_of, wait_for_broadcasts
from latency.native import native
from rollcast.comm import Deadline
from rollcast.comm.device.storage import flat_bytes

# Share of a GPU's memory: the buffer stands beside the weights, their shadow and the KV cache.
MAX_BUFFER_SHARE = 1 / 8
CHUNK_BYTES = 4 << 30
# Time for the worker, whose first broadcast has arrived, to post the next one.
POST_S = 0.001
# A single update is given up after this many times `max_seconds`.
PATIENCE = 4.0


@contextmanager
def rollcast(bench: Bench, *, mode: str | None) -> Iterator[Run]:
    """Yield `broadcaster.sync`, timed from call to return. `mode=None` is the configured one."""
    arguments = {} if mode is None else {"mode": mode}

    def run() -> Sample:
        start = time.perf_counter()
        report = bench.sync(**arguments)
        seconds = time.perf_counter() - start
        workers = {f"worker {phase}": time_s for worker in report.workers for phase, time_s in worker.phases_s.items()}
        return Sample(seconds, dict(report.phases_s) | workers)

    yield run


@contextmanager
def rollcast_nccl(bench: Bench) -> Iterator[Run]:
    """Yield the same over NCCL, as between machines."""
    if bench.device.type != "cuda":
        raise RuntimeError("NCCL needs CUDA")
    bench.use_transport("nccl")
    try:
        # The first sync plans and joins the groups.
        bench.sync()
        with rollcast(bench, mode=None) as run:
            yield run
    finally:
        bench.use_transport("auto")


@contextmanager
def raw_broadcast(bench: Bench, *, call: bool) -> Iterator[Run]:
    """Yield one broadcast of as many bytes; `call` includes the control call that makes the worker receive."""
    on_gpu = bench.device.type == "cuda"
    memory = torch.cuda.get_device_properties(bench.device).total_memory if on_gpu else None
    sizes = chunks(bench.nbytes, memory=memory)
    buffer = torch.zeros(max(sizes), dtype=torch.uint8, device=bench.device)
    try:
        yield partial(broadcast, bench, sizes=sizes, buffer=buffer, call=call)
    finally:
        bench.close_group()


def chunks(nbytes: int, *, memory: int | None) -> list[int]:
    """Return the sizes of the broadcasts: one, unless a buffer of as many bytes leaves an engine no memory."""
    if memory is None or nbytes <= memory * MAX_BUFFER_SHARE:
        return [nbytes]
    whole, rest = divmod(nbytes, CHUNK_BYTES)
    return [CHUNK_BYTES] * whole + [rest] * bool(rest)


def broadcast(bench: Bench, *, sizes: list[int], buffer: torch.Tensor, call: bool) -> Sample:
    """Broadcast the first bytes of the buffer, one size after the other, until both sides have finished."""
    group, deadline = bench.group(), Deadline(RPC_TIMEOUT_S)
    bench.synchronize()
    called = time.perf_counter()
    receiving = bench.receive("bench_receive", sizes, not call, RPC_TIMEOUT_S)
    if not call:
        # The worker's greeting says that it is about to post its receives.
        greeting = torch.zeros(1, dtype=torch.uint8, device=bench.device)
        wait_for_broadcasts([group.broadcast([greeting], root=1, deadline=deadline)], receiving)
        time.sleep(POST_S)
    start = time.perf_counter()
    works = [group.broadcast([buffer[:size]], root=0, deadline=deadline) for size in sizes]
    wait_for_broadcasts(works, receiving)
    # Both processes read the clock of one machine: the worker returns when it had everything.
    sender_end, receiver_end = time.perf_counter(), result_of(receiving)
    return Sample(time.perf_counter() - called if call else max(sender_end, receiver_end) - start)


@contextmanager
def rpc_per_tensor(bench: Bench) -> Iterator[Run]:
    """Yield an update that makes a control call, a broadcast into a temporary and a `load_weights` for each tensor."""
    bench.group()
    try:
        yield partial(_send_one_by_one, bench)
    finally:
        bench.close_group()


def _send_one_by_one(bench: Bench) -> Sample:
    group, deadline = bench.group(), Deadline(bench.spec.max_seconds * PATIENCE)
    start = time.perf_counter()
    for count, (name, tensor) in enumerate(bench.weights.items()):
        if not deadline.left_s():
            progress = f"{count} of {len(bench.weights)} tensors after {deadline.timeout_s:g} s"
            raise TimeoutError(f"one update takes too long: {progress}")
        dtype = str(tensor.dtype).removeprefix("torch.")
        loading = bench.receive("bench_load", name, dtype, list(tensor.shape), RPC_TIMEOUT_S)
        work = group.broadcast([flat_bytes(tensor)], root=0, deadline=Deadline(RPC_TIMEOUT_S))
        wait_for_broadcasts([work], loading)
        result_of(loading)
    return Sample(time.perf_counter() - start)


def checkpoint_engine(bench: Bench) -> AbstractContextManager[Run]:
    """Raise: MoonshotAI's checkpoint-engine (0.4) has a row that says why it is not measured."""
    raise RuntimeError(
        "is for other machines: it serves engines on its own ranks' GPUs, from pinned host memory, and one on a GPU "
        "apart from the trainer's through RDMA devices alone"
    )


@dataclass(frozen=True, slots=True)
class Method:
    """One method of the benchmark."""

    open: Callable[[Bench], AbstractContextManager[Run]]
    """Returns a context manager that yields the update."""
    is_rollcast: bool = False
    """Requests go on during the update, so it is also measured while the engine decodes; extra memory counts from
    before the first sync of the job, in which rollcast allocates."""
    sends_weights: bool = True
    """False: there is nothing to check in the engine."""
    needs_weight_transfer: bool = False
    """The engine starts with vLLM's own weight transfer configured."""


METHODS: dict[str, Method] = {
    "rollcast": Method(partial(rollcast, mode=None), is_rollcast=True),
    "rollcast-shadow": Method(partial(rollcast, mode="shadow"), is_rollcast=True),
    "raw-broadcast": Method(partial(raw_broadcast, call=False), sends_weights=False),
    "raw-broadcast-with-call": Method(partial(raw_broadcast, call=True), sends_weights=False),
    "rpc-per-tensor": Method(rpc_per_tensor),
    "vllm-native-packed": Method(partial(native, packed=True), needs_weight_transfer=True),
    "vllm-native-per-tensor": Method(partial(native, packed=False), needs_weight_transfer=True),
    "checkpoint-engine": Method(checkpoint_engine),
    "rollcast-nccl": Method(rollcast_nccl, is_rollcast=True),
}
