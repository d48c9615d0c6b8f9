"""vLLM's own NCCL weight transfer, by the API of the installed version (trainer)."""

import dataclasses
import socket
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any

import torch

from latency.bench import HOST, Bench, Run, Sample, result_of
from rollcast.comm import PhaseTimer

# A worker that refuses does so at once; the trainer would wait for it for minutes.
REFUSAL_S = 0.5


@contextmanager
def native(bench: Bench, *, packed: bool) -> Iterator[Run]:
    """Yield start, update and finish, with a communicator that is created once."""
    if bench.device.type != "cuda":
        raise RuntimeError("vLLM's weight transfer is NCCL only: it needs CUDA")
    group = _connect(bench, packed=packed)
    info = _update_info(bench, packed=packed)

    def run() -> Sample:
        timer = PhaseTimer()
        with timer("start"):
            bench.call("start_weight_update")
        with timer("update"):
            receiving = bench.start("update_weights", info)
            _send(bench, group, packed=packed)
            result_of(receiving)
        with timer("finish"):
            bench.call("finish_weight_update")
        return Sample(timer.total_s(), timer.phases_s)

    yield run


def _connect(bench: Bench, *, packed: bool) -> Any:
    """Return the communicator; the worker creates its side in a method of vLLM's."""
    from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

    port = _free_port()
    init_info: dict[str, Any] = {"master_address": HOST, "master_port": port, "rank_offset": 1, "world_size": 2}
    if not _packed_in_every_update():
        init_info["packed"] = packed
    joining = bench.start("init_weight_transfer_engine", init_info)
    if wait([joining], REFUSAL_S).done:
        result_of(joining)
    group = stateless_init_process_group(HOST, port, 0, 2, torch.cuda.current_device())
    result_of(joining)
    return group


def _packed_in_every_update() -> bool:
    """Return whether `packed` is part of each update (vLLM 0.26) rather than of the initialization (later)."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

    return "packed" in {field.name for field in dataclasses.fields(NCCLWeightTransferUpdateInfo)}


def _update_info(bench: Bench, *, packed: bool) -> dict[str, Any]:
    tensors = bench.weights.values()
    info: dict[str, Any] = {
        "names": list(bench.weights),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
        "shapes": [list(tensor.shape) for tensor in tensors],
    }
    return info | ({"packed": packed} if _packed_in_every_update() else {})


def _send(bench: Bench, group: Any, *, packed: bool) -> None:
    """Broadcast the weights as vLLM's trainer side does."""
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

    if packed:
        named = iter(bench.weights.items())
        packed_nccl_broadcast_producer(iterator=named, group=group, src=0, post_iter_func=lambda item: item[1])
    else:
        stream = torch.cuda.current_stream()
        for tensor in bench.weights.values():
            group.broadcast(tensor, src=0, stream=stream)
    torch.cuda.synchronize()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
