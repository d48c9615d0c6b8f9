"""Odd loaders in vLLM's own model: what lands is what vLLM loads, or the parameter is named."""

import pytest
from landing_process import LandingProcess

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


@pytest.mark.parametrize("case", LANDS)
def test_what_lands_is_what_vllm_loads(packed: LandingProcess, case: str) -> None:
    assert packed.run("lands", case=case) == {
        "problems": [],
        "different": [],
        "moved": None,
        "disturbed": [],
        "replaced": [],
        "digests": 1,
    }


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_land_is_refused_by_name(packed: LandingProcess, case: str, parameter: str) -> None:
    row = packed.run("refused", case=case, parameter=parameter)
    assert any(parameter in problem and REFUSED[case] in problem for problem in row["problems"]), row
    assert row["disturbed"] == [] and row["replaced"] == []


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_a_parameter_that_the_model_has_not_is_named(packed: LandingProcess, parameter: str) -> None:
    row = packed.run("refused", case="extra", parameter=parameter)
    assert "does not take parameter model.odd.weight" in row["problems"][0]


def test_the_plan_is_the_same_after_vllm_reloaded_the_model(packed: LandingProcess) -> None:
    assert packed.run("reload") == {"digests": 1}
