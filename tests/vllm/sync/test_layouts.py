"""Two trainer ranks into an engine of two workers: however the ranks hold the weights, the engine has the same."""

import pytest
from jobs import SharedJob
from layouts import LAYOUTS, sync_layout

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.fixture
def replicated(two_trainers: SharedJob) -> list[list[dict[str, str]]]:
    """What the engine has when both ranks have everything."""
    landed, *_ = two_trainers.on_trainers(sync_layout, "replicated", 1)
    return landed.fingerprints


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_lands_the_same_weights(
    two_trainers: SharedJob, replicated: list[list[dict[str, str]]], layout: str
) -> None:
    for landed in two_trainers.on_trainers(sync_layout, layout, 1):
        assert landed.fingerprints == replicated
        assert landed.tokens == landed.expected, "transformers' greedy tokens"
