"""A version is of the same weights wherever it is seen, or it is not seen at all: two engines, one of which fails."""

import time
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
from jobs import SharedJob
from oracle import distances, error_text
from trainer import Trainer

from rollcast.rollout import Sampling
from rollcast.rollout.sync.session import SyncSession

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

# Long enough for the other engine to commit, and to make what is asked of it.
DELAY_S = 4.0
STEP_S = 0.005
# Still under way when the sync fails, however slow the machine is.
LONG = Sampling(max_tokens=900, ignore_eos=True)
SHORT = Sampling(max_tokens=8, ignore_eos=True)
PROMPTS = [[5 + index, 6, 7, 8] * 12 for index in range(4)]


@pytest.fixture
def trainer(two_engines: SharedJob) -> Trainer:
    two_engines.trainer.pace(STEP_S)
    return two_engines.trainer


@dataclass(frozen=True, kw_only=True)
class HalfCommitted:
    """A sync that engine 0 commits and engine 1 does not."""

    problem: str
    in_flight: list[str]
    """What became of requests that were under way."""
    versions: list[int]
    """By engine."""
    refused: list[str]
    """What became of later requests."""


def check_served(trainer: Trainer, version: int) -> None:
    """Both engines answer, with this version and its weights' log-probabilities."""
    samples = [sample for (sample,) in trainer.pool.generate(PROMPTS, SHORT)]
    assert {sample.engine for sample in samples} == {0, 1}
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        assert [*sample.versions] == [version]
        assert distances(trainer.model, prompt, sample).max().item() < 1e-4


def refusals(trainer: Trainer) -> list[str]:
    """What is said to each prompt."""
    return [error_text(trainer.pool.submit(prompt, SHORT).result) for prompt in PROMPTS]


def commit_half(trainer: Trainer) -> HalfCommitted:
    pid = trainer.pool.call_workers("pid")[1][0]
    trainer.pool.call_workers("fail_next_switch", pid, DELAY_S)
    running = [trainer.pool.submit(prompt, LONG) for prompt in PROMPTS]
    return HalfCommitted(
        problem=error_text(lambda: trainer.update(mode="shadow")),
        in_flight=[error_text(future.result) for future in running],
        versions=[engine.version for engine in trainer.pool.describe()],
        refused=refusals(trainer),
    )


def interrupt_sync(trainer: Trainer, owner: Any, method: str) -> None:
    """Raise KeyboardInterrupt in a sync, as Ctrl-C does, when it first calls `method` of `owner`, and catch it here."""

    def interrupt(*_: Any, **__: Any) -> None:
        patch.stop()
        time.sleep(0.5)
        raise KeyboardInterrupt

    patch = mock.patch.object(owner, method, interrupt)
    patch.start()
    with pytest.raises(KeyboardInterrupt):
        trainer.sync()


def test_what_one_engine_alone_has_committed_is_not_handed_out(trainer: Trainer) -> None:
    old = trainer.version
    check_served(trainer, old)
    half = commit_half(trainer)
    assert half.problem.startswith(f"SyncError: sync of version {old + 1} failed")
    assert "engine 1" in half.problem and "the worker stumbled" in half.problem
    assert half.versions == [old + 1, old], "engine 0 has committed: else this shows nothing"
    refused = [*half.in_flight, *half.refused]
    assert all("refuses to generate until the next sync" in text for text in refused), refused
    assert any(text.startswith("EngineError: engine 0 has weights of an aborted sync") for text in refused)
    assert any(text.startswith("EngineError: engine 1 has partially updated weights") for text in refused)


def test_the_same_version_may_come_again_with_other_weights(trainer: Trainer) -> None:
    old = trainer.version
    assert commit_half(trainer).versions == [old + 1, old]
    # Engine 0 has nothing to serve meanwhile.
    trainer.update(mode="shadow")
    assert trainer.version == old + 1
    check_served(trainer, old + 1)


def test_a_sync_interrupted_before_it_is_agreed_on_is_not_served(trainer: Trainer) -> None:
    old = trainer.version
    parts: Any = trainer.broadcaster
    interrupt_sync(trainer, parts._lanes, "send")
    refused = refusals(trainer)
    assert all("refuses to generate until the next sync" in text for text in refused), refused
    trainer.sync()
    check_served(trainer, old + 1)


def test_a_sync_interrupted_after_it_is_agreed_on_is_served(trainer: Trainer) -> None:
    """All engines have committed, and none has been told so."""
    old = trainer.version
    interrupt_sync(trainer, SyncSession, "_finalize")
    assert trainer.version == old + 1
    check_served(trainer, old + 1)
