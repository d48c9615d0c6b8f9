"""Tensors that come from loaded weights without being loaded: written, computed again, or refused by name."""

import pytest
from landing_process import LandingProcess

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

CLEAN = {"problems": [], "changed": [], "different": [], "unseen": [], "nan differs from itself": False}
# Case, layout of linear weights on CPU: parted views, modules that compute again.
LANDS = {
    ("packed convolution", "plain"): (2, 0),
    ("view of a weight", "packed"): (2, 0),
    ("view of a weight", "plain"): (0, 0),
    ("weight moved in a forward pass", "plain"): (2, 0),
    ("fused gates", "plain"): (0, 2),
}
REFUSED = {
    "new in a forward pass": "model.layers.0.self_attn.q_norm:doubled [32] is computed while the engine ",
    "changed in a forward pass": "model.layers.0.self_attn.q_norm.table [32] is computed while the engine ",
}


@pytest.mark.parametrize(("case", "layout"), LANDS)
def test_a_sync_leaves_what_a_fresh_load_and_a_forward_pass_leave(
    landing_processes: dict[str, LandingProcess], case: str, layout: str
) -> None:
    views, recomputed = LANDS[case, layout]
    assert landing_processes[layout].run("derived", case=case) == CLEAN | {"views": views, "recomputed": recomputed}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_step_computes_again_is_refused_by_name(plain: LandingProcess, case: str) -> None:
    problems = plain.run("derived", case=case)["problems"]
    assert problems[0].startswith(REFUSED[case]) and len(problems) == 2
