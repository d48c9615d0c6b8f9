"""Adapters land in vLLM's slots exactly as vLLM's own loader puts them there from peft's files."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from torchrun import SEARCH_PATH, job_script

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

CASES = {
    "llama": 28,
    "llama@2": 56,
    "llama@2+sharded": 56,
    "qwen3-tied": 28,
    "phi3-fused": 16,
    "gemma3": 28,
    "qwen3_moe": 12,
    "opt": 24,
    "gpt_neox": 16,
}
REFUSED = {"phi3-fused@2": "vLLM computes with the adapters of model.layers.0.self_attn.qkv_proj.lora_b, "}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("adapters")
    done = subprocess.run(
        [sys.executable, job_script("lora_matrix.py"), folder, *CASES, *REFUSED],
        env=os.environ | {"PYTHONPATH": SEARCH_PATH, "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["case"]: row for row in rows}


@pytest.mark.parametrize("case", CASES)
def test_landing_equals_vllms_own_load(rows: dict[str, dict[str, Any]], case: str) -> None:
    assert rows[case] == {"case": case, "moves": CASES[case], "different": []}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(rows: dict[str, dict[str, Any]], case: str) -> None:
    assert REFUSED[case] in rows[case]["error"]
