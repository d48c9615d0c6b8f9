"""GPUs of pytest-xdist's processes."""

import pytest
from shares import share_of


@pytest.mark.parametrize(
    ("gpus", "worker", "workers", "expected"),
    [
        ("0", 0, 1, "0"),
        ("0123", 0, 2, "01"),
        ("0123", 1, 2, "23"),
        ("0123", 2, 2, "01"),
        ("01234", 1, 2, "23"),
        ("012", 2, 3, "2"),
    ],
)
def test_a_process_has_gpus_of_its_own(gpus: str, worker: int, workers: int, expected: str) -> None:
    assert "".join(share_of([*gpus], worker=worker, workers=workers)) == expected


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="3 processes cannot share 2 GPUs: run pytest with -n 2 at most"):
        share_of(["0", "1"], worker=0, workers=3)
