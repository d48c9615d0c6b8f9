"""Waiting for others: agreement between trainer ranks over a real store, joining a group, deadlines."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import pytest
import torch
from torch import distributed as dist

from rollcast.comm import Deadline, host_store, join_group
from rollcast.comm.agree import Agreement

SIZE = 3
LONG_S = 30.0


class Ranks:
    """Agreements of three ranks over one store, and the store itself."""

    def __init__(self) -> None:
        self.store, address = host_store("127.0.0.1", timeout_s=LONG_S)
        host, port = address.split(":")
        timeout = timedelta(seconds=LONG_S)
        # A wait blocks its connection: one for each rank.
        stores = [dist.TCPStore(host, int(port), is_master=False, timeout=timeout) for _ in range(SIZE)]
        self.agreements = [Agreement(store, rank=rank, size=SIZE) for rank, store in enumerate(stores)]
        self.threads = ThreadPoolExecutor(SIZE)

    def start(self, function: Callable, rank: int, *args: object) -> Future:
        return self.threads.submit(function, self.agreements[rank], *args)

    def gather(self, words: list[str]) -> list[list[str]]:
        """One round: what each rank was told when rank i says `words[i]`."""
        started = [self.start(say, rank, word) for rank, word in enumerate(words)]
        return [future.result(LONG_S) for future in started]


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.threads.shutdown()


def say(agreement: Agreement, word: str, timeout_s: float = LONG_S) -> list[str]:
    return agreement.gather(word, deadline=Deadline(timeout_s))


def test_every_rank_hears_all_words_in_rank_order(ranks: Ranks) -> None:
    for words in (["c", "b", "a"], ["", "", ""], ["é\n", "x" * 10_000, ""], ["same", "same", "other"]):
        assert ranks.gather(words) == [words] * SIZE


def test_fast_ranks_never_mix_up_rounds(ranks: Ranks) -> None:
    rounds = 30

    def talk(agreement: Agreement, rank: int) -> list[list[str]]:
        heard: list[list[str]] = []
        for turn in range(rounds):
            if turn % SIZE == rank:
                time.sleep(0.002)
            heard.append(say(agreement, f"{turn}.{rank}"))
        return heard

    started = [ranks.start(talk, rank, rank) for rank in range(SIZE)]
    expected = [[f"{turn}.{rank}" for rank in range(SIZE)] for turn in range(rounds)]
    assert [future.result(LONG_S) for future in started] == [expected] * SIZE


def test_keys_do_not_pile_up(ranks: Ranks) -> None:
    counts: list[int] = []
    for turn in range(8):
        ranks.gather([f"{turn}.{rank}" for rank in range(SIZE)])
        counts.append(ranks.store.num_keys())
    assert counts[-1] == counts[0] <= SIZE + 1


@pytest.mark.parametrize("missing", range(SIZE))
def test_a_missing_rank_is_named(ranks: Ranks, missing: int) -> None:
    ranks.gather(["here"] * SIZE)
    others = [rank for rank in range(SIZE) if rank != missing]
    start = time.monotonic()
    started = [ranks.start(say, rank, "here", 0.3) for rank in others]
    for future in started:
        with pytest.raises(TimeoutError, match=rf"trainer rank {missing} .*0\.3 s"):
            future.result(LONG_S)
    assert time.monotonic() - start < 3.0


def test_ranks_go_on_after_one_was_late(ranks: Ranks) -> None:
    """The late rank still finds the words of its round, and the next round is in step."""
    for early in [ranks.start(say, rank, f"first {rank}", 0.3) for rank in (0, 1)]:
        with pytest.raises(TimeoutError, match="trainer rank 2"):
            early.result(LONG_S)
    assert ranks.start(say, 2, "first 2").result(LONG_S) == ["first 0", "first 1", "first 2"]
    assert ranks.gather(["a", "b", "c"]) == [["a", "b", "c"]] * SIZE


def test_one_rank_needs_no_store() -> None:
    agreement = Agreement(dist.HashStore(), rank=0, size=1)
    assert [say(agreement, word) for word in ("a", "b")] == [["a"], ["b"]]


@pytest.mark.parametrize("timeout_s", [0, -1.5])
def test_a_deadline_must_be_positive(timeout_s: float) -> None:
    with pytest.raises(ValueError, match=f"positive, got {timeout_s}"):
        Deadline(timeout_s)


def test_a_deadline_names_what_was_waited_for() -> None:
    deadline = Deadline(0.05)
    assert 0 < deadline.left("nothing").total_seconds() <= 0.05
    time.sleep(0.06)
    assert deadline.left_s() == 0.0
    with pytest.raises(TimeoutError, match=r"wait for the engines: the deadline was 0\.05 s"):
        deadline.left("the engines")


def test_waits_on_a_spent_deadline_name_themselves(ranks: Ranks) -> None:
    deadline = Deadline(0.01)
    time.sleep(0.02)
    with pytest.raises(TimeoutError, match="trainer rank 0"):
        ranks.agreements[0].gather("word", deadline=deadline)
    group = join_group("gloo", dist.HashStore(), rank=0, size=1, deadline=Deadline(LONG_S))
    with pytest.raises(TimeoutError, match="a gloo broadcast"):
        group.broadcast(torch.zeros(1, dtype=torch.uint8), root=0, deadline=deadline)


def test_peers_that_do_not_come_are_not_waited_for() -> None:
    store, _ = host_store("127.0.0.1", timeout_s=LONG_S)
    start = time.monotonic()
    with pytest.raises((TimeoutError, dist.DistStoreError)):
        join_group("gloo", store, rank=0, size=2, deadline=Deadline(0.3))
    assert time.monotonic() - start < 3.0


def test_unknown_transport_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown transport 'mpi', expected one of gloo, nccl"):
        join_group("mpi", dist.HashStore(), rank=0, size=1, deadline=Deadline(1))


def test_leaving_ends_a_broadcast_under_way() -> None:
    """What `PoolBroadcaster` counts on when an engine fails and its workers still hold the group."""
    store, address = host_store("127.0.0.1", timeout_s=LONG_S)
    with ThreadPoolExecutor(2) as threads:
        join = partial(join_group, "gloo", size=2, deadline=Deadline(LONG_S))
        ours, theirs = threads.submit(join, store, rank=0), threads.submit(join, address, rank=1)
        group = ours.result(LONG_S)
        work = group.broadcast(torch.zeros(1 << 20, dtype=torch.uint8), root=0, deadline=Deadline(2.0))
        waiting = threads.submit(work.wait, Deadline(2.0))
        start = time.monotonic()
        group.close()
        assert waiting.exception(LONG_S)
        assert time.monotonic() - start < 1.0
        theirs.result(LONG_S).close()
