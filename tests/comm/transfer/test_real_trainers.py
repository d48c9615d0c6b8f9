"""DeepSpeed's and Megatron's own ranks: what they send is what their own collectives gather.

Neither package is a requirement; the tests are skipped without them. To run them (no kernel is compiled):

    DS_BUILD_OPS=0 pip install --no-deps --no-build-isolation hjson msgpack deepspeed==0.19.8 megatron-core==0.16.1
"""

import json
from pathlib import Path
from typing import Any

import pytest
from torchrun import run_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
SETTINGS: dict[str, Any] = {
    "ZeRO-1": {"zero_optimization": {"stage": 1}},
    # Parameters of less than 100 elements stay whole, too.
    "ZeRO-3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}},
    "ZeRO-3, bfloat16, offloaded": {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    },
}


@pytest.mark.parametrize(("settings", "ranks"), [("ZeRO-1", 2), ("ZeRO-3", 3), ("ZeRO-3, bfloat16, offloaded", 2)])
def test_deepspeed_sends_what_it_gathers(tmp_path: Path, settings: str, ranks: int) -> None:
    pytest.importorskip("deepspeed")
    arguments = HERE / "zero3_job.py", json.dumps(SETTINGS[settings])
    done = run_job(*arguments, ranks=ranks, cwd=tmp_path, timeout_s=500)
    assert done.code == 0, done.output


def test_megatron_sends_what_it_gathers(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    done = run_job(HERE / "megatron_job.py", ranks=2, cwd=tmp_path, timeout_s=500)
    assert done.code == 0, done.output
