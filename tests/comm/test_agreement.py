"""Waiting for others: agreement between trainer ranks over a real store, joining a group, deadlines."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import distributed as dist

from rollcast.comm import Deadline, agreement, host_store, join_group
from rollcast.comm.agreement import Agreement, first_error

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

    def start(self, function: Callable, rank: int, *args: object) -> Future[Any]:
        return self.threads.submit(function, self.agreements[rank], *args)

    def decide(self, topic: str, words: list[str]) -> list[str]:
        """What each rank was told when rank i says `words[i]`."""
        started = [self.start(say, rank, topic, word) for rank, word in enumerate(words)]
        return [future.result(LONG_S) for future in started]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(agreement, "MARGIN_S", 0.2)
    made = Ranks()
    yield made
    made.threads.shutdown()


def say(agreement: Agreement, topic: str, word: str, timeout_s: float = LONG_S) -> str:
    return agreement.decide(topic, word, "|".join, deadline=Deadline(timeout_s))


def test_every_rank_is_told_what_rank_0_makes_of_all_words_in_rank_order(ranks: Ranks) -> None:
    for topic, words in {"a": ["c", "b", "a"], "b": ["", "", ""], "c": ["é\n", "x" * 10_000, ""]}.items():
        assert ranks.decide(topic, words) == ["|".join(words)] * SIZE


def test_only_rank_0_judges(ranks: Ranks) -> None:
    judged: list[int] = []

    def decide(agreement: Agreement, rank: int) -> str:
        def judge(words: Sequence[str]) -> str:
            judged.append(rank)
            return f"{len(words)} words"

        return agreement.decide("topic", "word", judge, deadline=Deadline(LONG_S))

    started = [ranks.start(decide, rank, rank) for rank in range(SIZE)]
    assert [future.result(LONG_S) for future in started] == ["3 words"] * SIZE
    assert judged == [0]


def test_fast_ranks_never_mix_up_topics(ranks: Ranks) -> None:
    def talk(agreement: Agreement, rank: int) -> list[str]:
        heard: list[str] = []
        for turn in range(30):
            if turn % SIZE == rank:
                time.sleep(0.002)
            heard.append(say(agreement, f"topic {turn}", f"{turn}.{rank}"))
        return heard

    started = [ranks.start(talk, rank, rank) for rank in range(SIZE)]
    expected = ["|".join(f"{turn}.{rank}" for rank in range(SIZE)) for turn in range(30)]
    assert [future.result(LONG_S) for future in started] == [expected] * SIZE


def test_keys_do_not_pile_up(ranks: Ranks) -> None:
    counts: list[int] = []
    for turn in range(8):
        ranks.decide(f"topic {turn}", ["a", "b", "c"])
        counts.append(ranks.store.num_keys())
    assert counts[-1] == counts[0] <= 2


@pytest.mark.parametrize("missing", [1, 2])
def test_all_that_came_are_told_who_did_not(ranks: Ranks, missing: int) -> None:
    others = [rank for rank in range(SIZE) if rank != missing]
    start = time.monotonic()
    told = [future.result(LONG_S) for future in [ranks.start(say, rank, "topic", "here", 0.3) for rank in others]]
    assert told == [f"trainer rank {missing} did not come within 0.3 s"] * 2
    assert 0.3 <= time.monotonic() - start < 3.0


def test_without_rank_0_there_is_no_verdict(ranks: Ranks) -> None:
    for early in [ranks.start(say, rank, "topic", "here", 0.3) for rank in (1, 2)]:
        with pytest.raises(TimeoutError, match=r"trainer rank 0 did not come within 0\.3 s"):
            early.result(LONG_S)
    # Rank 0 was only late, and must not go on without the two that gave up.
    assert "rank 1 did not come" in ranks.start(say, 0, "topic", "here").result(LONG_S)


@pytest.mark.parametrize("leaver", range(SIZE))
def test_a_rank_that_leaves_waits_for_nobody_and_everybody_hears_its_word(ranks: Ranks, leaver: int) -> None:
    ranks.agreements[leaver].leave("topic", "gone")
    told = [ranks.start(say, rank, "topic", "") for rank in range(SIZE) if rank != leaver]
    assert [future.result(LONG_S).strip("|") for future in told] == ["gone"] * 2


def test_a_late_rank_is_told_the_same_and_the_next_topic_is_in_step(ranks: Ranks) -> None:
    early = [ranks.start(say, rank, "first", "here", 0.3) for rank in (0, 1)]
    verdict = "trainer rank 2 did not come within 0.3 s"
    assert [future.result(LONG_S) for future in early] == [verdict] * 2
    assert ranks.start(say, 2, "first", "here").result(LONG_S) == verdict
    assert ranks.decide("second", ["a", "b", "c"]) == ["a|b|c"] * SIZE


def test_one_rank_needs_no_store() -> None:
    agreement = Agreement(dist.HashStore(), rank=0, size=1)
    assert [say(agreement, "topic", word) for word in ("a", "b")] == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "verdict"),
    [(["", "", ""], ""), (["", "b", ""], "b"), (["b", "", "a"], "b\na"), (["b", "a", "b"], "b\na")],
)
def test_first_error_tells_every_different_word(words: list[str], verdict: str) -> None:
    assert first_error(words) == verdict


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
    assert "trainer rank 0" in ranks.agreements[0].decide("topic", "word", "".join, deadline=deadline)
    group = join_group("gloo", dist.HashStore(), rank=0, size=1, deadline=Deadline(LONG_S))
    with pytest.raises(TimeoutError, match="a gloo broadcast"):
        group.broadcast([torch.zeros(1, dtype=torch.uint8)], root=0, deadline=deadline)


def test_peers_that_do_not_come_are_not_waited_for() -> None:
    store, _ = host_store("127.0.0.1", timeout_s=LONG_S)
    start = time.monotonic()
    with pytest.raises((TimeoutError, dist.DistStoreError)):
        join_group("gloo", store, rank=0, size=2, deadline=Deadline(0.3))
    assert time.monotonic() - start < 3.0


def test_unknown_transport_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown transport 'mpi', expected one of gloo, nccl"):
        join_group("mpi", dist.HashStore(), rank=0, size=1, deadline=Deadline(1))


LEAVE = """
import torch
from concurrent.futures import ThreadPoolExecutor
from rollcast.comm import Deadline, host_store, join_group

store, address = host_store("127.0.0.1", timeout_s=30)
with ThreadPoolExecutor(2) as threads:
    joining = [
        threads.submit(join_group, "gloo", where, rank=rank, size=2, deadline=Deadline(30))
        for rank, where in enumerate((store, address))
    ]
group, peer = [future.result() for future in joining]
work = group.broadcast([torch.zeros(1 << 20, dtype=torch.uint8)], root=0, deadline=Deadline(5))
group.close()
try:
    work.wait(Deadline(30))
except RuntimeError as error:
    print(error)
"""


def test_leaving_ends_a_broadcast_under_way_and_the_process_can_end() -> None:
    """What `PoolBroadcaster` counts on when an engine fails and its workers still hold the group."""
    run = subprocess.run([sys.executable, "-P", "-c", LEAVE], capture_output=True, text=True, timeout=LONG_S)
    assert "closed while a gloo broadcast was under way" in run.stdout
    assert run.returncode == 0, run.stderr
