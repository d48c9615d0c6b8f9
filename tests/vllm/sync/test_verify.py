"""Weights that are provably the ones sent: self-test, checksums, comparison, and nothing that grows."""

import gc
import re
import threading
from dataclasses import dataclass

import psutil
import pytest
from jobs import SharedJob
from states import EngineState, engine_state, sync_problem, sync_with_fault
from trainer import Trainer

from rollcast.rollout import EngineError, Sampling

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

MEGABYTE = 1 << 20
SYNCS = 50
MODES = ("in_place", "shadow")
FEW = Sampling(max_tokens=3)


@pytest.fixture
def trainer(one_engine: SharedJob) -> Trainer:
    return one_engine.trainer


def serving(version: int) -> EngineState:
    return EngineState(version=version, refuses=False)


def refusing(version: int) -> EngineState:
    return EngineState(version=version, refuses=True)


def check_serves(trainer: Trainer, version: int) -> None:
    assert engine_state(trainer) == serving(version)
    assert len(trainer.pool.generate([[5, 6]], FEW)) == 1


def refusal(trainer: Trainer) -> str:
    with pytest.raises(EngineError) as refused:
        trainer.pool.generate([[5, 6]], FEW)
    return str(refused.value)


def check_names_message(problem: str) -> None:
    assert re.search(r"message \d+ of lane 0 \((model\.|lm_head)\S*\[\d+:\d+\]\): checksum mismatch", problem), problem


def test_a_sync_of_the_same_weights_changes_no_byte(trainer: Trainer) -> None:
    """The trainer has made a self-test before its first sync, and a sync since."""
    assert trainer.pool.fingerprints() == trainer.at_start.fingerprints
    version = trainer.version
    trainer.broadcaster.self_test()
    assert engine_state(trainer) == serving(version)


def test_a_self_test_names_what_changed(trainer: Trainer) -> None:
    trainer.sync(verify="checksum")
    trainer.perturb()
    problem = sync_problem(trainer.broadcaster.self_test)
    assert "self-test" in problem and "tensors changed" in problem and "model." in problem
    assert engine_state(trainer) == refusing(trainer.version)
    trainer.sync(verify="full")
    assert engine_state(trainer) == serving(trainer.version)


def test_a_flipped_bit_names_the_message_and_sets_no_version(trainer: Trainer) -> None:
    trainer.update(verify="full")
    version = trainer.version
    trainer.perturb()
    outcome = sync_with_fault(trainer, "flip", {"verify": "checksum"})
    check_names_message(outcome.problem)
    assert outcome.state == refusing(version)


def test_full_verification_finds_what_changed_in_memory(trainer: Trainer) -> None:
    outcome = sync_with_fault(trainer, "flip after the checksum", {"verify": "full"})
    assert "model.norm.weight" in outcome.problem and "in memory" in outcome.problem
    trainer.sync()
    assert engine_state(trainer) == serving(trainer.version)


def test_a_flipped_bit_in_a_shadow_leaves_the_old_weights_serving(trainer: Trainer) -> None:
    version = trainer.version
    trainer.perturb()
    outcome = sync_with_fault(trainer, "flip", {"mode": "shadow", "verify": "checksum"})
    check_names_message(outcome.problem)
    check_serves(trainer, version)
    trainer.sync(mode="shadow", verify="full")
    trainer.broadcaster.self_test()
    check_serves(trainer, version + 1)


def test_a_sleeping_engine_says_what_to_do(trainer: Trainer) -> None:
    trainer.pool.sleep()
    problem = sync_problem(trainer.sync)
    assert "engine 0 sleeps: its weights cannot be updated before pool.wake_up" in problem
    assert refusal(trainer) == "engine 0 sleeps: call pool.wake_up() first"
    trainer.pool.wake_up(["weights"])
    trainer.sync()
    assert refusal(trainer) == "engine 0 sleeps: call pool.wake_up() first"
    trainer.pool.wake_up(["kv_cache"])
    check_serves(trainer, trainer.version)


def test_an_engine_that_dropped_its_weights_needs_a_sync(trainer: Trainer) -> None:
    trainer.pool.sleep(level=2)
    trainer.pool.wake_up()
    assert "dropped its weights in sleep(level=2): wake it up and sync" in refusal(trainer)
    trainer.sync()
    check_serves(trainer, trainer.version)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the trainer and every process of the engine hold."""

    python_threads: int
    """Those of the trainer alone."""
    threads: list[int]
    files: list[int]
    resident_bytes: list[int]


def resources(trainer: Trainer) -> Resources:
    gc.collect()
    (engine,) = trainer.pool.describe()
    service = psutil.Process(engine.pid)
    processes = [psutil.Process(), service, *service.children(recursive=True)]
    return Resources(
        python_threads=threading.active_count(),
        threads=[process.num_threads() for process in processes],
        files=[process.num_fds() for process in processes],
        resident_bytes=[process.memory_info().rss for process in processes],
    )


def test_fifty_syncs_leave_nothing_behind(trainer: Trainer) -> None:
    for number in range(10):
        trainer.sync(mode=MODES[number % 2])
    before = resources(trainer)
    for number in range(SYNCS):
        trainer.perturb()
        trainer.sync(mode=MODES[number % 2])
    after = resources(trainer)
    # Fewer is no leak: vLLM may end a thread or close a file of its own meanwhile.
    assert after.python_threads <= before.python_threads
    assert all(new <= old for old, new in zip(before.threads, after.threads, strict=True)), (before, after)
    assert all(new <= old for old, new in zip(before.files, after.files, strict=True)), (before, after)
    for old, new in zip(before.resident_bytes, after.resident_bytes, strict=True):
        assert new - old < 2 * MEGABYTE
