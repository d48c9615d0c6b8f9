"""Small agreements between the trainer ranks, over the job's store (trainer)."""

from collections.abc import Callable, Sequence
from datetime import timedelta

from torch import distributed as dist

from rollcast.comm.deadline import Deadline

# Ranks other than 0 wait a little longer than rank 0: its verdict may say who was late.
MARGIN_S = 2.0
NOW = timedelta(milliseconds=1)


class Agreement:
    """Lets rank 0 decide, from what every rank has to say, and tells all of them.

        verdict = agreement.decide("sync 3", word, first_error, deadline=Deadline(60))

    A topic is used once. Every rank gets the same verdict, however late it comes.
    """

    def __init__(self, store: dist.Store, *, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._verdicts: list[str] = []

    def decide(self, topic: str, word: str, judge: Callable[[Sequence[str]], str], *, deadline: Deadline) -> str:
        """Return `judge(words of all ranks, in rank order)`, called on rank 0 only. Collective.

        When a rank does not come in time the verdict says so. Raises `TimeoutError` if rank 0 does not come.
        """
        if self._size == 1:
            return judge([word])
        self._store.set(f"{topic}/{self._rank}", f"word {word}")
        if self._rank:
            return self._await_verdict(topic, deadline)
        try:
            words = [self._word(topic, rank, deadline) for rank in range(self._size)]
            # Whoever is here has read the verdicts of earlier topics.
            for key in self._verdicts:
                self._store.delete_key(key)
            self._verdicts.clear()
            verdict = judge(words)
        except TimeoutError as late:
            verdict = str(late)
        self._store.set(f"{topic}/verdict", verdict)
        self._verdicts.append(f"{topic}/verdict")
        return verdict

    def leave(self, topic: str, word: str) -> None:
        """Say `word` instead of a `decide`, and wait for nobody; rank 0's is the verdict. Not collective.

        For a rank that cannot go on: who comes to the topic, however late, hears of it.
        """
        if self._size > 1:
            self._store.set(*((f"{topic}/{self._rank}", f"word {word}") if self._rank else (f"{topic}/verdict", word)))

    def _word(self, topic: str, rank: int, deadline: Deadline) -> str:
        absent = TimeoutError(f"trainer rank {rank} did not come within {deadline.timeout_s:g} s")
        key = f"{topic}/{rank}"
        try:
            self._store.wait([key], deadline.left(f"trainer rank {rank}"))
        except dist.DistStoreError:
            raise absent from None
        kind, _, word = self._store.get(key).decode().partition(" ")
        self._store.delete_key(key)
        if kind != "word":
            raise absent
        return word

    def _await_verdict(self, topic: str, deadline: Deadline) -> str:
        key = f"{topic}/verdict"
        try:
            self._store.wait([key], timedelta(seconds=deadline.left_s() + MARGIN_S))
        except dist.DistStoreError:
            # Withdraw, so that a rank 0 that is merely late does not go on without this rank ...
            self._store.set(f"{topic}/{self._rank}", "gone")
            try:
                self._store.wait([key], NOW)  # ... unless it just has.
            except dist.DistStoreError:
                raise TimeoutError(f"trainer rank 0 did not come within {deadline.timeout_s:g} s") from None
        return self._store.get(key).decode()


def first_error(words: Sequence[str]) -> str:
    """A judge: every different word that is not empty."""
    return "\n".join(dict.fromkeys(word for word in words if word))


def unanimous(words: Sequence[str]) -> str:
    """A judge: all ranks must say the same."""
    for rank, word in enumerate(words):
        if word != words[0]:
            return (
                f"trainer ranks 0 and {rank} disagree: {words[0]} against {word}; every rank must make the "
                "same call, with a model of the same parameters"
            )
    return ""
