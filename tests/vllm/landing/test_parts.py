"""Parts of a model are kept by the engine, or skipped by vLLM's loader; what is missing otherwise is a problem."""

import pytest
from landing_process import LandingProcess, Row

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    "case",
    [
        "layer",
        "requires_grad",
        "text trainer",
        pytest.param("embedding", marks=pytest.mark.slow),
        pytest.param("tied embedding", marks=pytest.mark.slow),
        pytest.param("attention", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("layout", ["plain", pytest.param("packed", marks=pytest.mark.slow)])
def test_what_is_kept_stays_as_it_was_loaded(
    landing_processes: dict[str, LandingProcess], layout: str, case: str
) -> None:
    row = landing_processes[layout].run("parts", case=case)
    check_exact(row)
    assert row["skipped"] == []


def test_a_part_of_a_module_is_kept_where_vllm_leaves_the_module_as_it_is(plain: LandingProcess) -> None:
    check_exact(plain.run("parts", case="half of a module"))


def test_a_part_of_a_module_that_vllm_processes_is_refused(packed: LandingProcess) -> None:
    row = packed.run("parts", case="half of a module")
    (problem, *_) = row["problems"]
    assert "self_attn.qkv_proj: vLLM processes this module as a whole" in problem
    assert "k_proj.weight is kept" in problem and "keep both or send both" in problem


def test_what_is_missing_is_a_problem_that_names_the_way_out(plain: LandingProcess) -> None:
    row = plain.run("parts", case="text trainer, nothing said")
    assert any("visual" in problem and "keep=" in problem for problem in row["problems"])


@pytest.mark.parametrize(
    ("case", "skipped"), [("images switched off", "visual"), ("extra prediction layer", "layers.2")]
)
def test_what_the_loader_skips_is_not_sent(plain: LandingProcess, case: str, skipped: str) -> None:
    row = plain.run("parts", case=case)
    check_exact(row)
    assert row["skipped"] and all(skipped in name for name in row["skipped"])


def check_exact(row: Row) -> None:
    assert "error" not in row, row["error"]
    assert row["problems"] == [] and row["different"] == [] and row["sent"] > 0
