"""A sync costs a worker hardly more than copying its bytes (measured by benchmarks/landing_cost.py)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(400)]

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "landing_cost.py"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, SCRIPT, "--repeats", "11"], capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["results"]


def test_a_dense_model_costs_a_memcpy(rows: list[dict[str, Any]]) -> None:
    dense = rows[0]
    assert dense["tensors"] == 399
    assert dense["plan_to_memcpy"] <= 1.15
    assert dense["python_calls"]["plan"] <= 300


def test_many_experts_cost_few_calls(rows: list[dict[str, Any]]) -> None:
    experts = rows[1]
    assert experts["tensors"] > 4800 and experts["staged_modules"] == 24
    assert experts["python_calls"]["plan"] <= 10_000


def test_it_beats_a_layerwise_reload(rows: list[dict[str, Any]]) -> None:
    assert all(row["reload_to_plan"] >= 5 for row in rows)


def test_compiling_costs_a_few_reloads(rows: list[dict[str, Any]]) -> None:
    assert all(row["compile_s"] <= 4 * row["p50_s"]["layerwise_reload"] for row in rows)
