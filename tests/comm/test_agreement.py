"""Agreement between trainer ranks over a real store: one verdict on every rank, and no wait without an end."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from torch import distributed as dist

from rollcast.comm import Deadline, agreement, host_store
from rollcast.comm.agreement import Agreement, Verdict, unanimous

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

    def decide(self, topic: str, values: list[str]) -> list[Verdict[str]]:
        """Return each rank's verdict when rank i contributes `values[i]`."""
        started = [self.start(decide, rank, topic, value) for rank, value in enumerate(values)]
        return [future.result(LONG_S) for future in started]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(agreement, "MARGIN_S", 0.2)
    ranks = Ranks()
    yield ranks
    ranks.threads.shutdown()


def decide(agreement: Agreement, topic: str, value: str, timeout_s: float = LONG_S) -> Verdict[str]:
    return agreement.decide(topic, value, "|".join, deadline=Deadline(timeout_s))


def late(rank: int) -> Verdict[str]:
    return Verdict(error=f"trainer rank {rank} did not come within 0.3 s", late_rank=rank)


def test_every_rank_gets_what_rank_0_makes_of_all_values_in_rank_order(ranks: Ranks) -> None:
    for topic, values in {"a": ["c", "b", "a"], "b": ["", "", ""], "c": ["é\n", "x" * 10_000, ""]}.items():
        assert ranks.decide(topic, values) == [Verdict(value="|".join(values))] * SIZE


class Progress(msgspec.Struct, frozen=True):
    """A value with fields."""

    oldest: dict[int, int]
    errors: tuple[str, ...] = ()


def test_values_are_records(ranks: Ranks) -> None:
    def merge(values: Sequence[Progress]) -> Progress:
        return Progress({key: each for value in values for key, each in value.oldest.items()}, ("é",))

    def run(agreement: Agreement, rank: int) -> Verdict[Progress]:
        return agreement.decide("topic", Progress({rank: 2 * rank}), merge, deadline=Deadline(LONG_S))

    started = [ranks.start(run, rank, rank) for rank in range(SIZE)]
    expected = Verdict(value=Progress({0: 0, 1: 2, 2: 4}, ("é",)))
    assert [future.result(LONG_S) for future in started] == [expected] * SIZE


def test_only_rank_0_combines(ranks: Ranks) -> None:
    combined: list[int] = []

    def run(agreement: Agreement, rank: int) -> Verdict[str]:
        def combine(values: Sequence[str]) -> str:
            combined.append(rank)
            return f"{len(values)} values"

        return agreement.decide("topic", "value", combine, deadline=Deadline(LONG_S))

    started = [ranks.start(run, rank, rank) for rank in range(SIZE)]
    assert [future.result(LONG_S) for future in started] == [Verdict(value="3 values")] * SIZE
    assert combined == [0]


def test_an_error_in_combining_is_the_verdict_of_every_rank(ranks: Ranks) -> None:
    def run(agreement: Agreement, value: str) -> Verdict[str]:
        return agreement.decide("topic", value, unanimous, deadline=Deadline(LONG_S))

    started = [ranks.start(run, rank, value) for rank, value in enumerate(["a", "a", "b"])]
    verdicts = [future.result(LONG_S) for future in started]
    assert verdicts == [verdicts[0]] * SIZE
    assert verdicts[0].value is None and verdicts[0].late_rank is None
    assert verdicts[0].error.startswith("trainer ranks 0 and 2 disagree: a against b; ")


def test_fast_ranks_never_mix_up_topics(ranks: Ranks) -> None:
    def run(agreement: Agreement, rank: int) -> list[Verdict[str]]:
        verdicts: list[Verdict[str]] = []
        for turn in range(30):
            if turn % SIZE == rank:
                time.sleep(0.002)
            verdicts.append(decide(agreement, f"topic {turn}", f"{turn}.{rank}"))
        return verdicts

    started = [ranks.start(run, rank, rank) for rank in range(SIZE)]
    expected = [Verdict(value="|".join(f"{turn}.{rank}" for rank in range(SIZE))) for turn in range(30)]
    assert [future.result(LONG_S) for future in started] == [expected] * SIZE


def test_keys_do_not_pile_up(ranks: Ranks) -> None:
    counts: list[int] = []
    for turn in range(8):
        ranks.decide(f"topic {turn}", ["a", "b", "c"])
        counts.append(ranks.store.num_keys())
    assert counts[-1] == counts[0] <= 2


@pytest.mark.parametrize("missing", [1, 2])
def test_all_ranks_that_came_get_the_late_rank(ranks: Ranks, missing: int) -> None:
    others = [rank for rank in range(SIZE) if rank != missing]
    start = time.monotonic()
    started = [ranks.start(decide, rank, "topic", "here", 0.3) for rank in others]
    assert [future.result(LONG_S) for future in started] == [late(missing)] * 2
    assert 0.3 <= time.monotonic() - start < 3.0


def test_without_rank_0_the_others_name_it(ranks: Ranks) -> None:
    started = [ranks.start(decide, rank, "topic", "here", 0.3) for rank in (1, 2)]
    assert [future.result(LONG_S) for future in started] == [late(0)] * 2
    # Rank 0 was only late, and must not go on without the two that gave up.
    assert ranks.start(decide, 0, "topic", "here").result(LONG_S).late_rank == 1


@pytest.mark.parametrize("leaver", range(SIZE))
def test_a_rank_that_leaves_waits_for_nobody_and_every_rank_gets_its_value(ranks: Ranks, leaver: int) -> None:
    ranks.agreements[leaver].leave("topic", "gone")
    started = [ranks.start(decide, rank, "topic", "") for rank in range(SIZE) if rank != leaver]
    values = [future.result(LONG_S).value for future in started]
    assert [value.strip("|") for value in values] == ["gone"] * 2


def test_a_late_rank_gets_the_same_verdict_and_the_next_topic_is_in_step(ranks: Ranks) -> None:
    early = [ranks.start(decide, rank, "first", "here", 0.3) for rank in (0, 1)]
    assert [future.result(LONG_S) for future in early] == [late(2)] * 2
    assert ranks.start(decide, 2, "first", "here").result(LONG_S) == late(2)
    assert ranks.decide("second", ["a", "b", "c"]) == [Verdict(value="a|b|c")] * SIZE


def test_one_rank_needs_no_store() -> None:
    agreement = Agreement(dist.HashStore(), rank=0, size=1)
    assert [decide(agreement, "topic", value).value for value in ("a", "b")] == ["a", "b"]


def test_a_wait_on_a_spent_deadline_names_the_rank(ranks: Ranks) -> None:
    deadline = Deadline(0.01)
    time.sleep(0.02)
    verdict = ranks.agreements[0].decide("topic", "value", "".join, deadline=deadline)
    assert verdict == Verdict(error="trainer rank 0 did not come within 0.01 s", late_rank=0)


@pytest.mark.parametrize("refusing", range(SIZE))
def test_a_rank_that_refuses_is_the_verdict_of_all_others(ranks: Ranks, refusing: int) -> None:
    """Whoever comes later; the next topic is as if nothing had been."""
    ranks.agreements[refusing].refuse("a", "no weights")
    others = [rank for rank in range(SIZE) if rank != refusing]
    started = [ranks.start(decide, rank, "a", "x") for rank in others]
    expected = Verdict[str](error=f"trainer rank {refusing}: no weights")
    assert [future.result(LONG_S) for future in started] == [expected, expected]
    assert ranks.decide("b", ["1", "2", "3"]) == [Verdict(value="1|2|3")] * SIZE
