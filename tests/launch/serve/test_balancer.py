"""Requests go where their beginning is cached, or where the fewest are."""

import json
from contextlib import ExitStack
from typing import Any

import pytest

from rollcast.launch.serve import balancer as balancer_module
from rollcast.launch.serve.balancer import AVOID_S, Balancer, prompt_prefix


def chat(*turns: str, **fields: Any) -> str:
    messages = [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]
    return prompt_prefix(json.dumps({"messages": messages, **fields}).encode())


def test_the_engine_with_the_fewest_requests_is_the_first() -> None:
    balancer = Balancer(3)
    with ExitStack() as stack:
        for _ in range(6):
            engine, *_ = balancer.candidates("")
            stack.enter_context(balancer.request(engine, ""))
        assert balancer.loads == (2, 2, 2)
    assert balancer.loads == (0, 0, 0)


def test_a_request_that_raises_is_over() -> None:
    balancer = Balancer(1)
    with pytest.raises(ZeroDivisionError), balancer.request(0, ""):
        raise ZeroDivisionError
    assert balancer.loads == (0,)


def test_a_conversation_stays_with_its_engine() -> None:
    balancer = Balancer(3)
    first = chat("a" * 200)
    with balancer.request(2, first):
        pass
    assert balancer.candidates(chat("a" * 200, "b" * 90, "c"))[0] == 2
    assert balancer.candidates(chat("b" * 200))[0] == 0


def test_the_longest_beginning_decides() -> None:
    balancer = Balancer(3)
    system = "s" * 500
    for engine, turn in ((1, "x" * 100), (2, "y" * 100)):
        with balancer.request(engine, chat(system, turn)):
            pass
    assert balancer.candidates(chat(system, "x" * 100, "more"))[0] == 1
    assert balancer.candidates(chat(system, "y" * 100, "more"))[0] == 2


def test_a_beginning_that_all_share_does_not_overload_one_engine() -> None:
    balancer = Balancer(2)
    shared = chat("s" * 500)
    with ExitStack() as stack:
        for _ in range(40):
            engine, *_ = balancer.candidates(shared)
            stack.enter_context(balancer.request(engine, shared))
        assert max(balancer.loads) <= 24 and sum(balancer.loads) == 40


def test_an_engine_to_avoid_comes_last_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(balancer_module.time, "monotonic", lambda: now)
    balancer = Balancer(3)
    with balancer.request(0, chat("a" * 200)):
        pass
    balancer.avoid(0)
    assert balancer.candidates(chat("a" * 200)) == [1, 2, 0]
    now += AVOID_S
    assert balancer.candidates(chat("a" * 200)) == [0, 1, 2]


def test_the_oldest_beginnings_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollcast.rollout.pool.router.MAX_BLOCKS", 10)
    balancer = Balancer(2)
    for letter in "ab":
        with balancer.request(1, letter * 64 * 8):
            pass
    assert balancer.candidates("a" * 64 * 8)[0] == 0
    assert balancer.candidates("b" * 64 * 8)[0] == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"prompt": "abc"}, {"prompt": "abcdef"}),
        ({"prompt": [1, 2]}, {"prompt": [1, 2, 3]}),
        ({"input": [{"content": "a"}]}, {"input": [{"content": "a"}, {"content": "b"}]}),
        ({"tools": [{"name": "add"}], "messages": [{}]}, {"messages": [{}, {}], "tools": [{"name": "add"}]}),
        ({"prompt": "abc", "temperature": 0.5}, {"temperature": 0.7, "prompt": "abcd"}),
    ],
)
def test_what_goes_on_begins_alike(before: dict[str, Any], after: dict[str, Any]) -> None:
    first, second = (prompt_prefix(json.dumps(body).encode()) for body in (before, after))
    assert first != second and second.startswith(first.rstrip('"]}'))


def test_other_tools_are_another_beginning() -> None:
    assert chat("a", tools=[{"name": "add"}])[:20] != chat("a", tools=[{"name": "sub"}])[:20]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"{}"])
def test_a_body_without_a_prompt_has_no_beginning(body: bytes) -> None:
    balancer = Balancer(2)
    with balancer.request(1, prompt_prefix(body)):
        assert balancer.candidates(prompt_prefix(body)) == [0, 1]
