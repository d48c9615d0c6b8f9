"""After a sync the engines hold, bit for bit, what a fresh engine loads from the trainer's checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import build
from torchrun import JOBS, run_job

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def fresh_fingerprint(folder: Path, report: Path) -> dict[str, str]:
    environ = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, JOBS / "fresh.py", folder, report], env=environ, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (worker,) = json.loads(report.read_text())
    return worker


def synced_facts(kind: str, tmp_path: Path, *, trainers: int, engines: int) -> dict[str, Any]:
    build(kind).save_pretrained(tmp_path / "initial")
    arguments = (kind, tmp_path / "initial", tmp_path / "saved", tmp_path / "facts.json", trainers, 1)
    done = run_job(JOBS / "exact.py", *map(str, arguments), ranks=trainers + engines, cwd=tmp_path, timeout_s=300)
    assert done.code == 0, done.output
    return json.loads((tmp_path / "facts.json").read_text())


@pytest.mark.parametrize(("kind", "trainers", "engines"), [("untied", 1, 1), ("tied", 2, 2)])
def test_a_synced_engine_equals_a_fresh_one(tmp_path: Path, kind: str, trainers: int, engines: int) -> None:
    facts = synced_facts(kind, tmp_path, trainers=trainers, engines=engines)
    before = fresh_fingerprint(tmp_path / "initial", tmp_path / "before.json")
    after = fresh_fingerprint(tmp_path / "saved", tmp_path / "after.json")
    check_equal(facts, before, after, engines=engines)


def check_equal(facts: dict[str, Any], before: dict[str, str], after: dict[str, str], *, engines: int) -> None:
    weights = {name for name in after if after[name] != before[name]}
    assert len(weights) >= 15, "the perturbation must reach the engine's weights"
    assert len(facts["fingerprints"]) == engines
    for (worker,) in facts["fingerprints"]:
        assert worker == after
    assert facts["tokens"] == facts["expected"]
    assert facts["versions"] == [[2]] * len(facts["versions"])
    assert facts["describe"] == [[2, None]] * engines
    assert len(facts["sync"]["workers"]) == engines
