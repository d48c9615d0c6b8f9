"""Odd loaders in vLLM's own model: what lands is what vLLM loads, or the parameter is named."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from torchrun import SEARCH_PATH, job_script

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

PARAMETERS = ("model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.o_proj.weight")
LANDS = ("identity", "plus one", "cast", "transposed", "permuted", "joined", "edited source", "where")
LANDS += ("computed in place",)
MISTAKES = {
    "missing": "elements would not be written",
    "duplicated": "is listed twice",
    "another shape": "does not take parameter",
    "another kind": "int64 does not fit into torch.float32",
}
REFUSED = {
    "item": "item",
    "numpy": "numpy",
    "mask": "nonzero",
    "rebound": "holds on to",
    "turned": "puts another tensor in its place",
    "dropped": "elements would not be written",
    "stashed": "holds on to",
    "written twice": "twice",
    "average": "old values",
} | MISTAKES


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """One process for all: importing vLLM takes longest."""
    environ = os.environ | {"PYTHONPATH": SEARCH_PATH, "TQDM_DISABLE": "1"}
    command = [sys.executable, job_script("odd_loaders.py"), tmp_path_factory.mktemp("models")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return {(row["case"], row["parameter"]): row for row in found}


@pytest.mark.parametrize("case", LANDS)
def test_what_lands_is_what_vllm_loads(rows: dict[Any, Any], case: str) -> None:
    assert rows[case, ""] == {
        "case": case,
        "parameter": "",
        "problems": [],
        "different": [],
        "moved": None,
        "disturbed": [],
        "replaced": [],
        "digests": 1,
    }


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_land_is_refused_by_name(rows: dict[Any, Any], case: str, parameter: str) -> None:
    row = rows[case, parameter]
    assert any(parameter in problem and REFUSED[case] in problem for problem in row["problems"]), row
    assert row["disturbed"] == [] and row["replaced"] == []


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_a_parameter_that_the_model_has_not_is_named(rows: dict[Any, Any], parameter: str) -> None:
    assert "does not take parameter model.odd.weight" in rows["extra", parameter]["problems"][0]


def test_the_plan_is_the_same_after_vllm_reloaded_the_model(rows: dict[Any, Any]) -> None:
    assert rows["reload", ""]["digests"] == 1
