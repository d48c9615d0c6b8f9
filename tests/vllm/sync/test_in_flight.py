"""Requests that a sync meets half way, and the pool's and broadcaster's refusals."""

from typing import Any

import pytest
from models import build
from torchrun import run_facts_of_trainers

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LENGTH = 400


SHAPES = {"alone": (1, 1), "crowd": (2, 2)}
"""Trainers, and workers of the engine."""
RANKS = [("alone", 0), ("crowd", 0), ("crowd", 1)]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for name, (trainers, size) in SHAPES.items():
        folder = tmp_path_factory.mktemp("in_flight")
        build("untied").save_pretrained(folder / "model")
        arguments, ranks = (str(trainers), str(size)), trainers + size
        facts = run_facts_of_trainers("in_flight.py", folder, *arguments, trainers=trainers, ranks=ranks, timeout_s=250)
        found |= {(name, rank): its for rank, its in enumerate(facts)}
    return found


@pytest.fixture(params=RANKS, ids=lambda its: f"{its[0]}-{its[1]}")
def facts(shapes: dict[tuple[str, int], dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    return shapes[request.param]


@pytest.mark.parametrize(
    ("way", "version"),
    [
        ("in_place keep kept", 1),
        ("in_place abort kept", 3),
        ("shadow keep kept", 4),
        ("in_place keep recomputed", 5),
        ("shadow abort kept", 6),
    ],
)
def test_requests_are_cut_at_the_very_token_and_go_on(facts: dict[str, Any], way: str, version: int) -> None:
    """Before the cut the log-probabilities are the old weights' own; right behind it they are not.

    Where keys and values are made anew, all that is behind is the new weights' own.
    """
    behind: list[float] = []
    for tokens, logprobs, reason, spans, *around in facts[way]:
        assert (tokens, logprobs, reason) == (LENGTH, LENGTH, "length")
        assert [its[0] for its in spans] in ([version - 1], [version - 1, version], [version])
        if len(spans) == 2:
            assert around[0] < 1e-4
            behind.append(around[1])
            assert (around[2] < 1e-4) is not way.endswith("keep kept")
    assert len(behind) >= 12
    # A single token can happen to be as likely under both.
    assert sum(difference > 1e-4 for difference in behind) > 0.8 * len(behind)


def test_wait_lets_requests_finish_under_the_old_version(facts: dict[str, Any]) -> None:
    assert facts["in_place wait kept"][:12] == [[LENGTH, LENGTH, "length", [[1, 0]]]] * 12


def test_the_old_prefix_cache_serves_nobody(facts: dict[str, Any]) -> None:
    assert max(facts["after"]) < 1e-4


def test_refusals_say_what_to_do(facts: dict[str, Any]) -> None:
    assert facts["replaced"].startswith("RuntimeError: this broadcaster was closed")
    assert facts["not newer"] == "ValueError: version must grow: 6 after 6"
    assert "unknown pause_mode 'never', expected one of keep, wait, abort" in facts["unknown mode"]
    assert facts["newer"] == 7
    assert facts["long prompt"].startswith("ValueError: prompt 1 has 1024 tokens, but max_model_len is 1024")
    assert facts["closed"].startswith("EngineError: the pool is closed")
