"""Completions are cut where the engine switched to another version of the weights."""

import pytest

from rollcast.rollout.engine.requests import REQUEST_ID
from rollcast.rollout.engine.samples import Switch, join_spans, spans_from, spans_of


@pytest.mark.parametrize(
    ("request_id", "number"),
    [
        ("rollcast-12", 12),
        ("rollcast-12-0a1b2c3d", 12),
        ("chatcmpl-7", None),
    ],
)
def test_vllms_request_ids_are_read(request_id: str, number: int | None) -> None:
    match = REQUEST_ID.match(request_id)
    assert (match and int(match["number"])) == number


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
    assert join_spans(((1, 0), (2, 5)), [(2, 7), (3, 9)]) == ((1, 0), (2, 5), (3, 9))
    assert join_spans(((1, 0), (2, 5)), [(3, 5)]) == ((1, 0), (3, 5))
    assert join_spans(((1, 0), (2, 0)), [(1, 0)]) == ((1, 0),)
    assert spans_from(((1, 0), (2, 5), (3, 9)), 6) == ((2, 0), (3, 3))
    assert spans_from(((1, 0), (2, 5)), 5) == ((2, 0),)
