"""Responses get their policy versions, whatever the application sends."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from rollcast.rollout.engine.openai.client import RESPONSE_VERSIONS, ResponseVersions
from rollcast.rollout.engine.openai.middleware import PolicyVersionMiddleware

JSON = (b"content-type", b"application/json; charset=utf-8")
EVENTS = (b"content-type", b"text/event-stream")


class App:
    """Sends these bodies; before each, `ResponseVersions` gets the values beside it."""

    def __init__(self, *pieces: tuple[dict[str, Any], bytes], headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.pieces = pieces
        self.headers = list(headers)
        self.raises: Exception | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        versions = RESPONSE_VERSIONS.get()
        assert isinstance(versions, ResponseVersions)
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        for index, (values, body) in enumerate(self.pieces):
            for name, value in values.items():
                setattr(versions, name, value)
            await send({"type": "http.response.body", "body": body, "more_body": index < len(self.pieces) - 1})
        if self.raises:
            raise self.raises


def answer(app: App, method: str = "POST") -> tuple[int, dict[bytes, bytes], list[bytes]]:
    """Return status, headers and bodies, as the client gets them."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(PolicyVersionMiddleware(app)({"type": "http", "method": method}, None, send))
    head, *bodies = sent
    return head["status"], dict(head["headers"]), [message["body"] for message in bodies]


def test_an_object_that_comes_in_pieces_gets_versions() -> None:
    whole = json.dumps({"choices": [{"index": 1}, {"index": 0}]}).encode()
    values = {"spans": {0: ((3, 0),), 1: ((3, 0), (4, 7))}, "samples": 2, "version": 4}
    headers = [JSON, (b"content-length", b"%d" % len(whole))]
    status, heads, (body,) = answer(App(({}, whole[:9]), (values, whole[9:]), headers=headers))
    content = json.loads(body)
    assert (status, heads[b"x-rollcast-version"], heads[b"content-length"]) == (200, b"4", b"%d" % len(body))
    assert content["policy_version"] == 4
    assert [choice["policy_spans"] for choice in content["choices"]] == [[[3, 0], [4, 7]], [[3, 0]]]


def test_events_have_the_version_of_their_own_sample() -> None:
    def event(choice: int) -> bytes:
        return f'event: it\ndata: {{"choices": [{{"index": {choice}}}]}}\n\n'.encode()

    pieces = [
        ({"spans": {0: ((1, 0),)}, "version": 1}, event(0)),
        ({"spans": {0: ((1, 0),), 1: ((1, 0), (2, 5))}, "version": 2}, event(0) + event(1)),
        ({}, b'data: {"usage": 3}\n\ndata: [DONE]\n\n'),
    ]
    _, heads, bodies = answer(App(*pieces, headers=[EVENTS]))
    lines = [line for body in bodies for line in body.decode().splitlines() if line.startswith("data: {")]
    assert [json.loads(line[6:])["policy_version"] for line in lines] == [1, 1, 2, 2]
    assert heads[b"x-rollcast-version"] == b"1"
    assert bodies[0].startswith(b"event: it\n") and bodies[-1].endswith(b"data: [DONE]\n\n")


def test_events_that_come_before_the_first_token_wait_for_its_version() -> None:
    early, late = b'data: {"type": "response.created"}\n\n', b'data: {"type": "response.output_text.delta"}\n\n'
    app = App(({}, early), ({}, early), ({"version": 5}, late), ({}, b"data: [DONE]\n\n"), headers=[EVENTS])
    status, heads, bodies = answer(app)
    assert (status, heads[b"x-rollcast-version"], len(bodies)) == (200, b"5", 2)
    lines = [line for line in bodies[0].decode().splitlines() if line]
    assert [json.loads(line[6:]).get("policy_version") for line in lines] == [5, 5, 5]


def test_events_of_a_request_that_does_not_generate_wait_for_nothing() -> None:
    _, heads, bodies = answer(App(({}, b"data: {}\n\n"), ({}, b"data: [DONE]\n\n"), headers=[EVENTS]), "GET")
    assert bodies == [b"data: {}\n\n", b"data: [DONE]\n\n"] and b"x-rollcast-version" not in heads


def test_events_without_a_token_come_at_the_end() -> None:
    status, heads, bodies = answer(App(({}, b"data: {}\n\n"), ({}, b"data: [DONE]\n\n"), headers=[EVENTS]))
    assert (status, bodies) == (200, [b"data: {}\n\ndata: [DONE]\n\n"]) and b"x-rollcast-version" not in heads


@pytest.mark.parametrize("kind", [JSON, EVENTS])
@pytest.mark.parametrize("raises", [None, RuntimeError("again, as Starlette does")])
def test_a_refusal_is_503_and_a_browser_may_read_it(kind: tuple[bytes, bytes], raises: Exception | None) -> None:
    browser = (b"access-control-allow-origin", b"*")
    app = App(({"refusal": "partially updated"}, b'data: {"error": "x"}\n\n'), ({}, b"more"), headers=[kind, browser])
    app.raises = raises
    status, heads, bodies = answer(app)
    assert (status, heads[browser[0]]) == (503, b"*")
    assert json.loads(b"".join(bodies))["error"]["message"] == "partially updated"


def test_a_stream_that_has_started_ends_with_the_applications_error() -> None:
    first = ({"version": 1, "spans": {0: ((1, 0),)}}, b'data: {"choices": []}\n\n')
    app = App(first, ({"refusal": "partially updated"}, b'data: {"error": "partially updated"}\n\n'), headers=[EVENTS])
    status, _, bodies = answer(app)
    assert status == 200 and b'"error": "partially updated"' in bodies[-1]


@pytest.mark.parametrize("body", [b"", b"\x1f\x8bzipped", b'{"b": 1,  "a": 2}'])
def test_bodies_that_were_not_generated_are_not_touched(body: bytes) -> None:
    _, heads, bodies = answer(App(({}, body), headers=[JSON]))
    assert bodies == [body] and b"x-rollcast-version" not in heads


def test_an_error_of_the_application_itself_is_raised() -> None:
    app = App(({}, b"{}"), headers=[JSON])
    app.raises = RuntimeError("mine")
    with pytest.raises(RuntimeError, match="mine"):
        answer(app)
