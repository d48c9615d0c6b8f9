"""Small agreements between the trainer ranks, over the job's store (trainer)."""

from torch import distributed as dist

from rollcast.comm.deadline import Deadline


class Agreement:
    """Lets every trainer rank know what each of them has to say.

    words = agreement.gather("ready", deadline=Deadline(60))
    """

    def __init__(self, store: dist.Store, *, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._round = 0

    def gather(self, word: str, *, deadline: Deadline) -> list[str]:
        """Return the words of all ranks, in rank order. Collective. `TimeoutError` names a rank that is missing."""
        if self._size == 1:
            return [word]
        self._round += 1
        self._store.set(self._key(self._rank), word)
        words = [self._get(rank, deadline) for rank in range(self._size)]
        # Whoever has gathered this round proves that all have finished the one before.
        self._store.delete_key(self._key(self._rank, round_=self._round - 1))
        return words

    def _get(self, rank: int, deadline: Deadline) -> str:
        key = self._key(rank)
        try:
            self._store.wait([key], deadline.left(f"trainer rank {rank}"))
        except dist.DistStoreError:
            raise TimeoutError(f"trainer rank {rank} did not answer within {deadline.timeout_s:g} s") from None
        return self._store.get(key).decode()

    def _key(self, rank: int, round_: int | None = None) -> str:
        return f"{self._round if round_ is None else round_}/{rank}"
