"""Ranks with which NCCL would fail or hang are named before it tries."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from torch import distributed as dist

from rollcast.comm import Deadline
from rollcast.comm.transport.peers import Peer, PeerError, check_peers, check_settings, exchange_peers, nccl_settings

TRAINER = Peer("trainer rank 0", "a", "GPU-0", "2.28.9", {"NCCL_CUMEM_ENABLE": "1"})
WORKER = Peer("worker 0 of engine 0", "a", "GPU-1", "2.28.9", {"NCCL_CUMEM_ENABLE": "1"})


def test_peers_that_fit() -> None:
    check_peers([TRAINER, WORKER])
    check_peers([TRAINER, replace(WORKER, gpu="GPU-0", host="b")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": "GPU-0"}, "trainer rank 0 and worker 0 of engine 0 share GPU GPU-0 on a"),
        ({"nccl": "2.27.5"}, "trainer rank 0 has NCCL 2.28.9 and worker 0 of engine 0 has NCCL 2.27.5"),
        ({"settings": {}}, "NCCL_CUMEM_ENABLE is '1' on trainer rank 0 and not set on worker 0 of engine 0"),
        ({"settings": {"NCCL_CUMEM_ENABLE": "0"}}, "NCCL_CUMEM_ENABLE is '1' on trainer rank 0 and '0' on worker 0"),
        ({"settings": {**TRAINER.settings, "NCCL_ALGO": "Ring"}}, "NCCL_ALGO is not set on trainer rank 0 and 'Ring'"),
    ],
    ids=["one GPU", "version", "missing", "different", "extra"],
)
def test_peers_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PeerError, match=message):
        check_peers([TRAINER, replace(WORKER, **change)])


def test_host_specific_settings_may_differ() -> None:
    environ = {
        "NCCL_DEBUG": "INFO",
        "NCCL_SOCKET_IFNAME": "eth0",
        "NCCL_NVLS_ENABLE": "0",
        "NCCL_VERSION": "2",
        "X": "1",
    }
    assert nccl_settings(environ) == {"NCCL_NVLS_ENABLE": "0"}
    check_settings({"a": {}, "b": {}})


def test_every_rank_gets_the_records_of_all() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as ranks:
        exchanged = [
            ranks.submit(exchange_peers, store, peer, rank=rank, size=2, deadline=Deadline(10))
            for rank, peer in enumerate((TRAINER, WORKER))
        ]
    assert [each.result() for each in exchanged] == [[TRAINER, WORKER]] * 2
