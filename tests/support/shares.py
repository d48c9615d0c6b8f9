"""Which of the GPUs a process of pytest-xdist may use."""

from collections.abc import Sequence


def share_of(gpus: Sequence[str], *, worker: int, workers: int) -> list[str]:
    """As many for each of the `workers`, of its own. Raises `ValueError` when there are not enough.

    A worker that replaces one that has crashed has a higher number: it may share another's.
    """
    size = len(gpus) // workers
    if not size:
        raise ValueError(f"{workers} processes cannot share {len(gpus)} GPUs: run pytest with -n {len(gpus)} at most")
    place = worker % workers
    return list(gpus[place * size : (place + 1) * size])
