"""The ways to get new weights into an engine that are compared; each is one context manager (trainer).

What a method makes once, a group or a communicator, it makes before it yields the update that is timed.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

from latency.bench import RPC_TIMEOUT_S, Bench, Run, Sample, answer, wait_for
from latency.native import native
from rollcast.comm import Deadline
from rollcast.comm.device.storage import flat_bytes

# Of a GPU's memory: the buffer is beside the weights, their shadow and the KV cache.
MAX_BUFFER_SHARE = 1 / 8
CHUNK_BYTES = 4 << 30
# For the worker, which has greeted, to post the next broadcast as well.
POST_S = 0.001
# A method that has no end in sight is given up after this many times its share of time.
PATIENCE = 4.0


@contextmanager
def rollcast(bench: Bench, *, mode: str | None) -> Iterator[Run]:
    """`broadcaster.sync`, from call to return."""
    arguments = {} if mode is None else {"mode": mode}

    def run() -> Sample:
        start = time.perf_counter()
        report = bench.sync(**arguments)
        seconds = time.perf_counter() - start
        theirs = {f"worker {phase}": its for worker in report.workers for phase, its in worker.phases_s.items()}
        return Sample(seconds, dict(report.phases_s) | theirs)

    yield run


@contextmanager
def rollcast_nccl(bench: Bench) -> Iterator[Run]:
    """The same by NCCL, as between machines."""
    if bench.device.type != "cuda":
        raise RuntimeError("NCCL needs CUDA")
    bench.travel("nccl")
    try:
        # Plans and joins.
        bench.sync()
        with rollcast(bench, mode=None) as run:
            yield run
    finally:
        bench.travel("auto")


@contextmanager
def raw(bench: Bench, *, call: bool) -> Iterator[Run]:
    """One broadcast of as many bytes; `call` counts the control call that makes the worker receive."""
    on_gpu = bench.device.type == "cuda"
    memory = torch.cuda.get_device_properties(bench.device).total_memory if on_gpu else None
    sizes = chunks(bench.nbytes, memory=memory)
    buffer = torch.zeros(max(sizes), dtype=torch.uint8, device=bench.device)
    try:
        yield partial(broadcast, bench, sizes=sizes, buffer=buffer, call=call)
    finally:
        bench.close_group()


def chunks(nbytes: int, *, memory: int | None) -> list[int]:
    """Sizes of the broadcasts: one, unless a buffer of as many bytes leaves an engine no memory."""
    if memory is None or nbytes <= memory * MAX_BUFFER_SHARE:
        return [nbytes]
    whole, rest = divmod(nbytes, CHUNK_BYTES)
    return [CHUNK_BYTES] * whole + [rest] * bool(rest)


def broadcast(bench: Bench, *, sizes: list[int], buffer: torch.Tensor, call: bool) -> Sample:
    """Send the buffer's first bytes, size by size, with nothing in between. Until both sides have finished."""
    group, deadline = bench.group(), Deadline(RPC_TIMEOUT_S)
    bench.synchronize()
    called = time.perf_counter()
    receiving = bench.receive("bench_receive", sizes, not call, RPC_TIMEOUT_S)
    if not call:
        hello = torch.zeros(1, dtype=torch.uint8, device=bench.device)
        wait_for([group.broadcast([hello], root=1, deadline=deadline)], receiving)
        time.sleep(POST_S)
    start = time.perf_counter()
    works = [group.broadcast([buffer[:size]], root=0, deadline=deadline) for size in sizes]
    wait_for(works, receiving)
    mine, theirs = time.perf_counter(), answer(receiving)
    # One machine, one clock: the worker says when it had everything.
    return Sample(time.perf_counter() - called if call else max(mine, theirs) - start)


@contextmanager
def rpc_per_tensor(bench: Bench) -> Iterator[Run]:
    """One control call, one broadcast into a temporary and one `load_weights` for each tensor."""
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
            given_up = f"{count} of {len(bench.weights)} tensors after {deadline.timeout_s:g} s"
            raise TimeoutError(f"one update takes too long: {given_up}")
        dtype = str(tensor.dtype).removeprefix("torch.")
        loading = bench.receive("bench_load", name, dtype, list(tensor.shape), RPC_TIMEOUT_S)
        wait_for([group.broadcast([flat_bytes(tensor)], root=0, deadline=Deadline(RPC_TIMEOUT_S))], loading)
        answer(loading)
    return Sample(time.perf_counter() - start)


def checkpoint_engine(bench: Bench) -> AbstractContextManager[Run]:
    """MoonshotAI's checkpoint-engine (0.4). Only says why it is not here."""
    raise RuntimeError(
        "is for other machines: it serves engines on its own ranks' GPUs, from pinned host memory, and one on a GPU "
        "apart from the trainer's through RDMA devices alone"
    )


Method = Callable[[Bench], AbstractContextManager[Run]]

TABLE: dict[str, Method] = {
    "rollcast": partial(rollcast, mode=None),
    "rollcast-shadow": partial(rollcast, mode="shadow"),
    "raw-broadcast": partial(raw, call=False),
    "raw-broadcast-with-call": partial(raw, call=True),
    "rpc-per-tensor": rpc_per_tensor,
    "vllm-native-packed": partial(native, packed=True),
    "vllm-native-per-tensor": partial(native, packed=False),
    "checkpoint-engine": checkpoint_engine,
    "rollcast-nccl": rollcast_nccl,
}
