"""A refusal says which side has what and what to do, without vLLM's page of names."""

import pytest
from landing_process import LandingProcess

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

WORDS = {
    "resized": ("the trainer's vocabulary has 104 rows, the engine's 96", "resize_token_embeddings()"),
    "packed": ("uint8", "packed or quantised weights must be dequantised"),
    "inside": ("parameter actor.model.embed_tokens.weight", "Pass the model itself to job.broadcaster()", "names="),
    "reshaped": ("self_attn.o_proj.weight [64, 5] float32", "the engine's", "[64, 128]"),
}


@pytest.mark.parametrize("case", WORDS)
def test_a_mistake_is_told_from_both_sides(plain: LandingProcess, case: str) -> None:
    row = plain.run("mistake", case=case)
    assert "error" not in row, row["error"]
    for words in WORDS[case]:
        assert words in row["text"]
    assert "without a message" not in row["text"] and len(row["text"]) < 700
