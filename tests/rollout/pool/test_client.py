"""The pool and its client: requests end when the engine, or the job, does."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import pytest
from prometheus_client import generate_latest
from torch import distributed as dist

from rollcast.comm import Deadline
from rollcast.rollout import EngineError, Sampling
from rollcast.rollout.errors import Failure
from rollcast.rollout.pool.client import collect
from rollcast.rollout.pool.pool import Pool
from rollcast.rollout.protocol.connection import ID_BYTES
from rollcast.rollout.protocol.messages import Abort, Describe, Failed, Generate, Generated, Reply, Request
from rollcast.rollout.protocol.registry import EngineRegistry
from rollcast.rollout.protocol.sampling import Completion, Piece

SOON_S = 5.0
LOST = Failure(text="lost: it stumbled", engine=1, phase="run")


class Peer:
    """The other end of a pool's socket: answers prompts that start with 1 with their length, and no others."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        self.prompts: list[list[int]] = []
        self.seen: list[Request] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        line = Connection(self.server.accept()[0].detach())
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.take(line)

    def take(self, line: Connection) -> None:
        message = line.recv_bytes()
        request = msgspec.msgpack.decode(message[ID_BYTES:], type=Request)
        self.seen.append(request)
        if isinstance(request, Generate) and request.stream:
            # And one piece too many, later.
            for _ in range(2):
                line.send_bytes(message[:ID_BYTES] + msgspec.msgpack.encode(Piece([9], [0.0], ((0, 0),), None)))
                time.sleep(0.05)
        elif isinstance(request, Generate):
            self.prompts.append(request.prompt)
            if reply := answer(request):
                line.send_bytes(message[:ID_BYTES] + msgspec.msgpack.encode(reply))


def answer(request: Generate) -> Reply | None:
    first, length = request.prompt[0], len(request.prompt)
    if first == 0:
        return Failed([Failure(text="no zeros please", engine=0, worker=1, phase="generate")])
    return Generated([Completion([length], [0.0], "stop", ((0, 0),))]) if first == 1 else None


def waiting() -> Generate:
    """A request that is never answered."""
    return Generate(request_id="silent", prompt=[7], sampling=Sampling())


@pytest.fixture
def peers() -> list[Peer]:
    return [Peer(), Peer()]


@pytest.fixture
def registry() -> EngineRegistry:
    return EngineRegistry(dist.HashStore(), engines=2)


@pytest.fixture
def pool(registry: EngineRegistry, peers: list[Peer]) -> Iterator[Pool]:
    pool = Pool(registry, [peer.address for peer in peers], max_model_len=64)
    yield pool
    pool.close()


def failure(future: Future[Reply]) -> str:
    error = future.exception(SOON_S)
    assert isinstance(error, EngineError)
    return str(error)


def scrape(pool: Pool) -> str:
    return generate_latest(pool.metrics.registry).decode()


def test_every_prompt_is_answered_in_its_place(pool: Pool, peers: list[Peer]) -> None:
    prompts = [[1] * length for length in (5, 1, 4, 2, 3)]
    groups = pool.generate(prompts, Sampling())
    assert [group[0].token_ids for group in groups] == [[5], [1], [4], [2], [3]]
    assert sorted(len(prompt) for peer in peers for prompt in peer.prompts) == [1, 2, 3, 4, 5]


def test_n_is_the_calls_own_or_the_samplings(pool: Pool, peers: list[Peer]) -> None:
    pool.generate([[1]], Sampling(n=2))
    pool.generate([[1]], Sampling(n=2), n=5)
    pool.submit([1], Sampling(), n=3).result(SOON_S)
    seen = [request for peer in peers for request in peer.seen if isinstance(request, Generate)]
    assert sorted(request.sampling.n for request in seen) == [2, 3, 5]


@pytest.mark.parametrize("bad", [{"n": 0}, {"n": -1}, {"max_tokens": 0}])
def test_less_than_one_sample_or_token_is_refused(pool: Pool, bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="n and max_tokens must be at least 1"):
        Sampling(**bad)  # pyright: ignore[reportArgumentType]
    if "n" in bad:
        with pytest.raises(ValueError, match="n and max_tokens must be at least 1"):
            pool.generate([[1]], Sampling(), n=bad["n"])


def test_requests_and_tokens_are_counted_by_engine(pool: Pool) -> None:
    silent = pool.submit([7], Sampling(max_tokens=5))
    pool.generate([[1] * 3, [1] * 4], Sampling(max_tokens=5))
    text = scrape(pool)
    assert 'rollcast_requests{engine="0"} 1.0' in text and 'rollcast_load_tokens{engine="0"} 6.0' in text
    assert (
        'rollcast_requests{engine="1"} 0.0' in text and 'rollcast_completions_total{finish_reason="stop"} 2.0' in text
    )
    assert not silent.done()


def test_a_stream_left_behind_with_its_loop_harms_nobody(pool: Pool, peers: list[Peer]) -> None:
    async def leave() -> None:
        stream = pool.stream([2], Sampling())
        assert (await anext(stream)).token_ids == [9]

    for _ in range(2):
        asyncio.run(leave())
    assert pool.generate([[1], [1, 1]], Sampling())[1][0].token_ids == [2]


def test_a_cancelled_request_is_aborted_and_its_load_is_gone(pool: Pool, peers: list[Peer]) -> None:
    waiting = pool.submit([7], Sampling(), request_id="it")
    assert waiting.cancel()
    assert pool.generate([[1, 1], [1]], Sampling())[0][0].token_ids == [2]
    assert any(
        isinstance(request, Abort) and [each.rpartition("/")[2] for each in request.request_ids] == ["it"]
        for peer in peers
        for request in peer.seen
    )


def test_prompts_are_token_ids(pool: Pool) -> None:
    assert pool.generate([np.array([1, 1, 1])], Sampling())[0][0].token_ids == [3]  # type: ignore[list-item]
    with pytest.raises(ValueError, match="a prompt is a sequence of token ids"):
        pool.generate([["a"]], Sampling())  # type: ignore[list-item]
    assert 'rollcast_requests{engine="0"} 0.0' in scrape(pool)


def test_no_prompts_are_no_work(pool: Pool) -> None:
    assert pool.generate([], Sampling()) == []


def test_an_engines_failure_reaches_the_caller_as_a_record(pool: Pool) -> None:
    with pytest.raises(EngineError, match="engine 0, worker 1: no zeros please") as caught:
        pool.generate([[0]], Sampling())
    assert (caught.value.engine, caught.value.worker, caught.value.phase) == (0, 1, "generate")


def test_failures_of_several_engines_are_collected(pool: Pool, registry: EngineRegistry) -> None:
    registry.report_lost(LOST)
    pending = {engine: pool.client.request(engine, waiting()) for engine in (0, 1)}
    assert failure(pending[1])
    with pytest.raises(EngineError) as caught:
        collect(pending, deadline=Deadline(0.1))
    assert caught.value.failures == (
        Failure(text="no answer within 0.1 s", engine=0),
        LOST,
    )
    assert str(caught.value) == "engine 0: no answer within 0.1 s\nengine 1: lost: it stumbled"


def test_requests_of_a_lost_engine_fail_and_those_of_others_go_on(pool: Pool, registry: EngineRegistry) -> None:
    silent = [pool.client.request(engine, waiting()) for engine in (0, 1)]
    registry.report_lost(LOST)
    assert failure(silent[1]) == "engine 1: lost: it stumbled"
    assert not silent[0].done()
    assert failure(pool.client.request(1, Describe())) == "engine 1: lost: it stumbled"
    assert pool.generate([[1, 1]], Sampling())[0][0].token_ids == [2]


def test_an_engine_that_is_lost_before_all_serve_fails_the_start(registry: EngineRegistry) -> None:
    failure = Failure(text="ended while starting", engine=1, phase="start")
    registry.announce(0, "127.0.0.1:1")
    registry.report_lost(failure)
    with pytest.raises(EngineError, match=r"^engine 1 did not start: ended while starting$") as caught:
        registry.addresses(deadline=Deadline(SOON_S))
    assert caught.value.failures == (failure,)
    registry.report_lost(LOST)
    with pytest.raises(EngineError, match=r"^engine 1: lost: it stumbled$") as caught:
        registry.addresses(deadline=Deadline(SOON_S))
    assert caught.value.failures == (LOST,)


def test_a_call_of_workers_may_have_a_deadline(pool: Pool) -> None:
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"engine 0: no answer within 0\.2 s"):
        pool.call_workers("method", deadline=Deadline(0.2))
    assert time.monotonic() - start < 2.0


def test_when_the_job_is_over_nothing_waits(pool: Pool, registry: EngineRegistry) -> None:
    silent = pool.client.request(0, waiting())
    registry.finish()
    assert "the job is over" in failure(silent)


def test_when_the_store_is_gone_nothing_waits(peers: list[Peer]) -> None:
    class Gone(EngineRegistry):
        def lost(self) -> dict[int, Failure]:
            raise dist.DistNetworkError("connection reset")

    pool = Pool(Gone(dist.HashStore(), engines=2), [peer.address for peer in peers], max_model_len=64)
    assert "store is gone: connection reset" in failure(pool.client.request(0, waiting()))
    pool.close()


def test_a_closed_pool_refuses_and_fails_what_waits(pool: Pool) -> None:
    silent = pool.client.request(0, waiting())
    pool.close()
    assert "the pool was closed" in failure(silent)
    with pytest.raises(EngineError, match="the pool is closed"):
        pool.generate([[1]], Sampling())
    pool.close()


def test_a_bad_address_is_an_error(registry: EngineRegistry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(OSError, match=f"127.0.0.1:{port} cannot be reached"):
        Pool(registry, [f"127.0.0.1:{port}"], max_model_len=64)
