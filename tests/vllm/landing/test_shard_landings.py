"""Whatever layout two, three or four trainer ranks have, vLLM's models have what a fresh load gives, bit for bit."""

from typing import Any

import pytest
from landing_process import LandingProcess
from rank_layouts import LAYOUTS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ARCHITECTURES = {
    "plain": [
        "qwen3_moe@2",
        "llama-tied",
        "llama-tied@2",
        "phi3-fused",
        "phi3-fused@2",
        "gpt2",
        "gpt2@2",
        "qwen3_moe",
        "qwen3_moe@2+ep",
        "mixtral@2",
        "gpt_oss",
        "gpt_oss@2",
        "deepseek_v3",
        "deepseek_v3@2",
        "deepseek_v3@2+ep",
        "granitemoehybrid",
        "granitemoehybrid@2",
        "qwen3_next",
        "qwen3_next@2",
        "falcon_h1@2",
    ],
    "packed": ["llama-tied@2", "qwen3_moe", "qwen3_moe@2", "deepseek_v3@2", "granitemoehybrid@2"],
}
CASES = [(case, layout) for layout, cases in ARCHITECTURES.items() for case in cases]
QUICK = ("qwen3_moe@2", "plain")


@pytest.mark.parametrize(
    ("case", "layout", "trainers"),
    [
        pytest.param(*QUICK, [3], id="quick"),
        *(pytest.param(*pair, [2, 3, 4], marks=pytest.mark.slow) for pair in CASES),
    ],
)
def test_every_layout_of_trainers_lands_as_a_fresh_load(
    landing_processes: dict[str, LandingProcess], case: str, layout: str, trainers: list[int]
) -> None:
    row: dict[str, Any] = landing_processes[layout].run("shards", case=case, trainers=trainers)
    assert "error" not in row, row
    assert row["trials"] == len(LAYOUTS) * len(trainers)
    assert row["different"] == {} and row["idle"] == []
    assert all(senders == int(name.split(" x ")[1]) for name, senders in row["senders"].items()), row["senders"]
