"""Every architecture lands bit for bit, or is refused by name, in vLLM's own models."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from architectures import ARCHITECTURES, REFUSED
from torchrun import JOBS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

SUBSET = ("gpt2", "llama-tied", "phi3-fused", "gemma3", "qwen3")


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process for all that this run selected: importing vLLM takes longer than an architecture."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = {call.params.get("name") for call in calls if call}
    names = [name for name in (*ARCHITECTURES, *REFUSED) if name in wanted]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join((str(JOBS), str(JOBS.parent))), "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, JOBS / "architecture_matrix.py", tmp_path_factory.mktemp("models"), *names],
        env=environ,
        capture_output=True,
        text=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert len(found) == len(names), done.stderr[-4000:]
    return {row["name"]: row for row in found}


@pytest.mark.parametrize(
    "name", [name if name in SUBSET else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_perturbed_weights_land_as_a_fresh_load(rows: dict[str, Any], name: str) -> None:
    row = rows[name]
    assert "error" not in row, row["error"]
    assert row["problems"] == [] and row["different"] == []
    assert row["stale_before"] > row["parameters"] / 4, "the perturbation must reach vLLM's tensors"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_land_yet_is_refused_by_name(rows: dict[str, Any], name: str) -> None:
    assert re.search(REFUSED[name][2], rows[name].get("error", "")), rows[name]
