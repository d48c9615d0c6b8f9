"""The benchmark of the pool's overhead: it compares engines with equal settings, and reports ratios."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from latency.stats import interval_of_median
from pool_overhead import check_settings, summary

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "pool_overhead.py"


@pytest.mark.slow
@pytest.mark.vllm
def test_one_engine_through_the_pool_and_by_itself(tmp_path: Path) -> None:
    counts = ("--requests", "8", "--max-tokens", "32", "--rounds", "3", "--pairs", "1")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--eager", *counts, "--json", tmp_path / "overhead.json"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads((tmp_path / "overhead.json").read_text())
    assert document["machine"]["cores"] and document["commit"] and document["versions"]["vllm"]
    assert len(document["pool_s"]) == len(document["llm_s"]) == 3
    low, high = document["ratio_interval"]
    assert low <= document["ratio"] <= high
    # Engines with other settings differ by more; three short rounds on a busy machine allow no closer bound.
    assert document["ratio"] > 0.5


def test_engines_with_other_settings_are_not_compared() -> None:
    facts = {"dtype": "torch.float32", "kv_cache_tokens": 1}
    with pytest.raises(ValueError, match=r"dtype is torch\.float32 and torch\.bfloat16"):
        check_settings(facts, facts | {"dtype": "torch.bfloat16"})
    with pytest.raises(ValueError, match="cuda_graphs is None and PIECEWISE"):
        check_settings(facts, facts | {"cuda_graphs": "PIECEWISE"})
    check_settings(facts, facts | {"kv_cache_tokens": 2})


def test_the_interval_is_wide_where_the_rounds_are() -> None:
    assert interval_of_median([[1.0] * 9]) == [1.0, 1.0]
    low, high = interval_of_median([[0.5, 0.8, 1.0, 1.2, 1.5]])
    assert low < 1.0 < high


def test_the_interval_is_wide_where_pairs_differ() -> None:
    low, high = interval_of_median([[0.9] * 9, [1.0] * 9, [1.1] * 9])
    assert (low, high) == (0.9, 1.1)


def test_the_summary_has_rates_and_ratios() -> None:
    options = Namespace(requests=10, max_tokens=20, rounds=3, pairs=2)
    pairs = [{"pool": [1.0, 2.0, 4.0], "llm": [1.0, 1.0, 2.0]}, {"pool": [2.0, 2.0, 2.0], "llm": [3.0, 3.0, 3.0]}]
    result = summary(pairs, options)
    assert (result["pool_tokens_per_s"], result["llm_tokens_per_s"]) == (100.0, 80.0)
    assert (result["ratio"], result["ratio_by_pair"]) == (1.25, [0.5, 1.5])
    assert result["ratio_interval"] == [0.5, 1.5]
    assert (result["pool_s"], result["llm_s"]) == ([1.0, 2.0, 4.0, 2.0, 2.0, 2.0], [1.0, 1.0, 2.0, 3.0, 3.0, 3.0])
