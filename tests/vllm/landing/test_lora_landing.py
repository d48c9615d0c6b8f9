"""Adapters land in vLLM's slots exactly as vLLM's own loader puts them there from peft's files."""

import pytest
from landing_process import LandingProcess

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


@pytest.mark.parametrize("case", CASES)
def test_landing_equals_vllms_own_load(packed: LandingProcess, case: str) -> None:
    assert packed.run("adapter", case=case) == {"case": case, "moves": CASES[case], "different": []}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(packed: LandingProcess, case: str) -> None:
    assert REFUSED[case] in packed.run("adapter", case=case)["error"]
