"""What the pool costs: the benchmark compares equals, and says what it found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from latency_stats import interval_of_median
from pool_overhead import check_settings

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "pool_overhead.py"


@pytest.mark.vllm
def test_one_engine_through_the_pool_and_by_itself(tmp_path: Path) -> None:
    counts = ("--requests", "8", "--max-tokens", "32", "--rounds", "3", "--pairs", "1")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--eager", *counts, "--json", tmp_path / "found.json"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["cores"] and found["commit"]
    assert len(found["pool_s"]) == len(found["llm_s"]) == 3
    low, high = found["ratio_interval"]
    assert low <= found["ratio"] <= high
    # Unlike engines differ by more; three short rounds on a busy machine say no more than this.
    assert found["ratio"] > 0.5


def test_unlike_engines_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch\.float32 and torch\.bfloat16"):
        check_settings({"dtype": "torch.float32", "more": 1}, {"dtype": "torch.bfloat16"})


def test_the_interval_is_wide_where_the_rounds_are() -> None:
    assert interval_of_median([1.0] * 9) == [1.0, 1.0]
    low, high = interval_of_median([0.5, 0.8, 1.0, 1.2, 1.5])
    assert low < 1.0 < high
