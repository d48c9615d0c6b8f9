"""Which tokens are of which version: counted from vLLM's schedules, cut at the switch."""

from types import SimpleNamespace
from typing import Any

import pytest

from rollcast.rollout.engine.requests import REQUEST_ID
from rollcast.rollout.engine.samples import Switch, from_token, joined, spans_of
from rollcast.rollout.worker.step_gate import MOST_GONE, StepWatch


def step(
    scheduled: dict[str, int],
    *,
    new: dict[str, tuple[int, int, int]] | None = None,
    cached: dict[str, tuple[int, int]] | None = None,
    finished: tuple[str, ...] = (),
) -> Any:
    """A schedule: `new` by prompt, known and computed tokens; `cached` by computed and output tokens."""
    news = [
        SimpleNamespace(
            req_id=name, prompt_token_ids=[0] * prompt, prefill_token_ids=[0] * known, num_computed_tokens=computed
        )
        for name, (prompt, known, computed) in (new or {}).items()
    ]
    old = cached or {}
    cached_requests = SimpleNamespace(
        req_ids=list(old),
        num_computed_tokens=[computed for computed, _ in old.values()],
        num_output_tokens=[made for _, made in old.values()],
    )
    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        scheduled_new_reqs=news,
        scheduled_cached_reqs=cached_requests,
        finished_req_ids=set(finished),
    )


def test_a_step_that_ends_a_prompt_makes_a_token() -> None:
    watch = StepWatch()
    assert watch.tokens() == {}
    watch.note(step({"a": 5, "b": 3}, new={"a": (5, 5, 0), "b": (8, 8, 0)}))
    assert watch.tokens() == {"a": 1, "b": 0}
    watch.note(step({"a": 1, "b": 5}, cached={"a": (5, 1), "b": (3, 0)}))
    assert watch.tokens() == {"a": 2, "b": 1}
    assert watch.tokens() == {"a": 2, "b": 1}


def test_requests_that_wait_or_end_keep_their_count() -> None:
    watch = StepWatch()
    watch.note(step({"a": 2, "b": 2}, new={"a": (2, 2, 0), "b": (2, 2, 0)}))
    watch.note(step({"a": 1}, cached={"a": (2, 1)}))
    watch.note(step({}, finished=("a",)))
    assert watch.tokens() == {"a": 2, "b": 1}
    # Run again from its start, with the token that it has made.
    watch.note(step({"b": 3}, new={"b": (2, 3, 0)}))
    assert watch.tokens() == {"b": 2}


def test_a_server_that_never_sees_a_sync_forgets() -> None:
    watch = StepWatch()
    for name in map(str, range(MOST_GONE + 10)):
        watch.note(step({name: 1}, new={name: (1, 1, 0)}))
        watch.note(step({}, finished=(name,)))
    tokens = watch.tokens()
    assert len(tokens) == MOST_GONE and list(tokens)[-1] == str(MOST_GONE + 9)


@pytest.mark.parametrize(
    ("request_id", "number"),
    [
        ("rollcast-12", 12),
        ("rollcast-12-0a1b2c3d", 12),
        ("chatcmpl-7", None),
    ],
)
def test_vllms_request_ids_are_read(request_id: str, number: int | None) -> None:
    found = REQUEST_ID.match(request_id)
    assert (found and int(found["number"])) == number


@pytest.mark.parametrize(
    ("cuts", "count", "spans"),
    [
        ([], 5, [(3, 0)]),
        ([2], 5, [(3, 0), (4, 2)]),
        ([None], 5, [(4, 0)]),
        ([0], 5, [(4, 0)]),
        ([5], 5, [(3, 0)]),
        ([2, 4], 5, [(3, 0), (4, 2), (5, 4)]),
        ([2, 2], 5, [(3, 0), (5, 2)]),
        ([0, 0], 5, [(5, 0)]),
        ([2, 5], 5, [(3, 0), (4, 2)]),
        ([0], 0, [(3, 0)]),
    ],
    ids=[
        "no switch",
        "in between",
        "not run",
        "no token",
        "over",
        "two",
        "none between",
        "twice",
        "second late",
        "none",
    ],
)
def test_a_completion_is_cut_where_the_engine_switched(
    cuts: list[int | None], count: int, spans: list[tuple[int, int]]
) -> None:
    switches = [Switch(3, {})]
    switches += [Switch(4 + at, {} if cut is None else {1: cut}) for at, cut in enumerate(cuts)]
    assert list(spans_of(switches, 1, count)) == spans


def test_spans_go_on_where_others_end() -> None:
    assert joined(((1, 0), (2, 5)), [(2, 7), (3, 9)]) == ((1, 0), (2, 5), (3, 9))
    assert joined(((1, 0), (2, 5)), [(3, 5)]) == ((1, 0), (3, 5))
    assert joined(((1, 0), (2, 0)), [(1, 0)]) == ((1, 0),)
    assert from_token(((1, 0), (2, 5), (3, 9)), 6) == ((2, 0), (3, 3))
    assert from_token(((1, 0), (2, 5)), 5) == ((2, 0),)
