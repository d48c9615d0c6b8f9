"""Engines that cannot take weights as they are refuse them by name, with the reason."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import build
from torchrun import SEARCH_PATH, job_script

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def test_lora_and_sleep_are_refused_by_name(tmp_path: Path) -> None:
    build("untied").save_pretrained(tmp_path / "model")
    environ = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": SEARCH_PATH}
    done = subprocess.run(
        [sys.executable, job_script("refusals.py"), tmp_path / "model", tmp_path / "report.json"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    errors = json.loads((tmp_path / "report.json").read_text())
    assert "enable_lora" in errors["lora"]
    assert "engine 0 sleeps" in errors["asleep"] and "wake_up" in errors["asleep"]
    assert errors["awake"] == errors["lora"]


def test_expert_load_balancing_is_refused_by_name() -> None:
    from vllm.config import ParallelConfig

    from rollcast.comm import Kept
    from rollcast.rollout.errors import LandingError
    from rollcast.rollout.worker.extension import RollcastWorker

    worker: Any = RollcastWorker()
    parallel = ParallelConfig()
    assert parallel.enable_eplb is False
    # Afterwards: vLLM itself refuses it where there is no GPU.
    parallel.enable_eplb = True
    worker.vllm_config = SimpleNamespace(parallel_config=parallel, lora_config=None)
    with pytest.raises(LandingError, match="enable_eplb"):
        worker.rollcast_prepare(b"", Kept().to_bytes())
    parallel.enable_eplb = False
    with pytest.raises(ValueError):
        worker.rollcast_prepare(b"", Kept().to_bytes())
