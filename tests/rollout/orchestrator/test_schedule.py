"""The orchestrator's table on a simulated clock: the order of events in every mode, and what holds for any timing."""

import random
from collections import Counter

import pytest
from timeline import Timeline

from rollcast.rollout import Mode, OrchestratorError, async_, on_policy, one_step_off
from rollcast.rollout.orchestrator.schedule import (
    TABLE,
    Generate,
    Generated,
    Phase,
    Started,
    State,
    Sync,
    Synced,
    Train,
    Trained,
)

ONE_AT_A_TIME = "generate 0, done 0, train 0, sync 1, generate 1, done 1, train 1, sync 2"
SLOW_TRAINING, SLOW_GENERATION = (1.0, 2.0), (2.0, 1.0)
LATE = 1
"""The batch that takes long."""


@pytest.mark.parametrize(
    ("mode", "times_s", "steps", "events"),
    [
        (on_policy(), SLOW_GENERATION, 2, ONE_AT_A_TIME),
        (on_policy(), SLOW_TRAINING, 2, ONE_AT_A_TIME),
        (async_(max_staleness=0), SLOW_TRAINING, 2, ONE_AT_A_TIME),
        (
            one_step_off(),
            SLOW_TRAINING,
            3,
            "generate 0, done 0, generate 1, train 0, done 1, sync 1, generate 2, train 1, done 2, sync 2, "
            "train 2, sync 3",
        ),
        (
            one_step_off(),
            SLOW_GENERATION,
            3,
            "generate 0, done 0, generate 1, train 0, done 1, sync 1, generate 2, train 1, done 2, sync 2, "
            "train 2, sync 3",
        ),
        (
            async_(max_staleness=1),
            SLOW_TRAINING,
            3,
            "generate 0, generate 1, done 0, done 1, train 0, sync 1, generate 2, train 1, done 2, sync 2, "
            "train 2, sync 3",
        ),
        (
            # The second sync meets batch 2 in flight, and training waits for it.
            async_(max_staleness=1),
            SLOW_GENERATION,
            3,
            "generate 0, generate 1, done 0, done 1, train 0, sync 1, generate 2, train 1, sync 2, done 2, "
            "train 2, sync 3",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Mode) else None,
)
def test_order_of_events(mode: Mode, times_s: tuple[float, float], steps: int, events: str) -> None:
    generate_s, train_s = times_s
    line = Timeline(mode, steps, lambda batch: generate_s, lambda batch: train_s).run()
    assert ", ".join(line.log) == events


@pytest.mark.parametrize(
    ("stale", "events"),
    [
        (
            # Batch 2 goes before the late one, batches 3 and 4 must not.
            "complete",
            "generate 0, generate 1, generate 2, done 0, done 2, train 0, sync 1, generate 3, train 2, sync 2, "
            "generate 4, done 3, done 4, done 1, train 1, sync 3, train 3, sync 4, train 4, sync 5",
        ),
        (
            "drop",
            "generate 0, generate 1, generate 2, done 0, done 2, train 0, sync 1, generate 3, train 2, sync 2, "
            "generate 4, done 3, train 3, done 4, sync 3, train 4, sync 4, done 1, drop 1, generate 5, done 5, "
            "train 5, sync 5",
        ),
    ],
)
def test_a_late_batch_is_waited_for_or_dropped(stale: str, events: str) -> None:
    mode = async_(max_staleness=2, stale=stale)
    line = Timeline(mode, 5, lambda batch: 9.0 if batch == LATE else 2.0).run()
    assert ", ".join(line.log) == events
    assert line.ages.get(LATE) == (2 if stale == "complete" else None)
    assert line.dropped_ages == ({} if stale == "complete" else {LATE: 4})


def test_generation_holds_back_while_training_is_slow() -> None:
    line = Timeline(async_(max_staleness=3), 20, lambda batch: 0.1, lambda batch: 50.0).run()
    assert line.most_in_hand == 4
    assert len(line.idle) == 1, "training waits for the first batch only"
    assert Counter(line.ages.values()) == {0: 1, 1: 1, 2: 1, 3: 17}


def random_line(seed: int, *, stale: str) -> Timeline:
    """Everything random: the bound, the number of steps, and times with a long tail."""
    rng = random.Random(seed)
    tail = rng.choice([0.0, 0.1, 0.5])
    scale = rng.choice([0.1, 1.0, 10.0])
    generate_s = [scale * rng.random() * (20.0 if rng.random() < tail else 1.0) for _ in range(400)]
    train_s = [rng.random() for _ in range(400)]
    mode = async_(max_staleness=rng.randrange(6), stale=stale)
    steps = rng.randrange(1, 60)
    return Timeline(mode, steps, generate_s.__getitem__, train_s.__getitem__, late=lambda _, room: rng.randint(0, room))


@pytest.mark.parametrize("stale", ["complete", "drop"])
def test_whatever_the_timing_nothing_too_old_is_trained_on_and_nothing_is_lost(stale: str) -> None:
    seen: Counter[str] = Counter()
    for seed in range(400):
        line = random_line(seed, stale=stale).run()
        bound = line.mode.max_staleness
        assert max(line.ages.values()) <= bound, seed
        assert len(line.ages) == line.steps == line.state.version == line.state.taken, seed
        assert sorted(line.started) == sorted([*line.ages, *line.dropped_ages]), "each is trained on or dropped"
        assert line.state.dropped == len(line.dropped_ages)
        assert all(age > bound for age in line.dropped_ages.values()), "what is fresh is not dropped"
        assert line.most_in_hand <= bound + 1
        assert not line.state.in_hand and not line.state.ready
        seen["at the bound"] += bound in line.ages.values() and bound > 0
        seen["dropped"] += len(line.dropped_ages)
        seen["overtaken"] += list(line.ages) != sorted(line.ages)
    assert seen["at the bound"] > 100 and seen["overtaken"] > 50, "the timings must be able to break the bound"
    assert (seen["dropped"] > 100) is (stale == "drop") and (seen["dropped"] == 0) is (stale == "complete")


def test_training_that_may_drop_never_waits_while_a_fresh_batch_is_there() -> None:
    waits = 0
    for seed in range(200):
        line = random_line(seed, stale="drop")
        line.late = lambda batch, room: room
        line.run()
        assert not line.dropped_ages, "with first tokens of the last version nothing is ever old"
        for start, end in line.idle:
            trained = {f"train {batch}" for batch in line.ages}
            assert trained and all(not start < line.ends[batch] < end for batch in line.ends), seed
            waits += 1
    assert waits > 100


def test_engines_that_serve_older_weights_than_synced_are_an_error() -> None:
    state = State(mode=async_(max_staleness=3), steps=9, version=4)
    assert state.step(Started()) == [Generate(0), Generate(1), Generate(2), Generate(3)]
    with pytest.raises(OrchestratorError, match=r"batch 1 has tokens of version 3, but began when .* version 4"):
        state.step(Generated({0: 4, 1: 3}))


def test_versions_go_on_from_where_an_earlier_run_ended() -> None:
    state = State(mode=on_policy(), steps=1, version=7)
    events = (Started(), Generated({0: 7}), Trained(), Generated(), Synced())
    assert [state.step(event) for event in events] == [[Generate(0)], [Train(0)], [], [Sync(8)], []]
    assert (state.phase, state.version) == (Phase.OVER, 8)


def test_every_row_can_be_reached_and_the_last_row_of_every_event_always_matches() -> None:
    last = {(row.phase, row.event): row.when for row in TABLE}
    state = State(mode=on_policy(), steps=1, version=0)
    assert all(when(state) for when in last.values()), "the last row of a phase and event takes whatever is left"
    assert {phase for phase, _ in last} == set(Phase) - {Phase.OVER}
    assert {row.next for row in TABLE} == set(Phase)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_staleness": -1}, "max_staleness must be at least 0, got -1"),
        ({"max_staleness": 1, "stale": "keep"}, "unknown stale 'keep', expected one of complete, drop"),
    ],
)
def test_bad_modes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        async_(**arguments)
