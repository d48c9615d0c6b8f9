"""The proxy in front of small servers that stand in for the engines' own ones."""

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from fake_engine import Answer, FakeEngine, free_address
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from rollcast.launch.serve import frontend as frontend_module
from rollcast.launch.serve.frontend import Frontend, serve_app

PIECES = 5
PAUSE_S = 0.2


@dataclass
class Pair:
    """Two engines, each with an address, and the proxy's port."""

    engines: list[FakeEngine]
    addresses: list[str]
    port: int
    registry: CollectorRegistry

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def call(self, path: str = "/v1/chat/completions", method: str = "POST", **content: Any) -> Answer:
        connection = self.connect()
        body = json.dumps(content) if method == "POST" else None
        connection.request(method, path, body, {"Content-Type": "application/json", "Authorization": "Bearer secret"})
        response = connection.getresponse()
        answer = Answer(
            response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        )
        connection.close()
        return answer

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        engines = [FakeEngine("zero"), FakeEngine("one")]
        addresses = [stack.enter_context(serve_app(each.app(), host="127.0.0.1", port=0)) for each in engines]
        yield proxied(stack, engines, [f"{address}/v1" for address in addresses])


def proxied(stack: ExitStack, engines: list[FakeEngine], addresses: list[str], **options: Any) -> Pair:
    registry = CollectorRegistry()
    app = Frontend(addresses, registry=registry, **options).app()
    address = stack.enter_context(serve_app(app, host="127.0.0.1", port=0))
    return Pair(engines, addresses, int(address.rpartition(":")[2]), registry)


def test_a_request_passes_untouched(pair: Pair) -> None:
    content = {"messages": [], "tools": [{"x": "é"}], "anything": None}
    answer = pair.call("/v1/chat/completions?a=1&b=%2F", **content)
    assert (answer.status, answer.by) == (200, "zero")
    assert (answer.headers["x-rollcast-version"], answer.headers["x-rollcast-engine"]) == ("7", "0")
    (request,) = pair.engines[0].requests
    assert pair.engines[0].bodies == [json.dumps(content).encode()]
    assert (request.url.path, request.url.query) == ("/v1/chat/completions", "a=1&b=%2F")
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["host"] == pair.addresses[0].removeprefix("http://").removesuffix("/v1")


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_any_path_and_method_passes(pair: Pair, method: str) -> None:
    answer = pair.call("/v1/responses/some%2Fid", method)
    assert answer.status == 200
    (request,) = pair.engines[0].requests
    assert (request.method, request.scope["raw_path"]) == (method, b"/v1/responses/some%2Fid")


def test_an_engines_own_refusals_pass(pair: Pair) -> None:
    answer = pair.call(model="bad")
    assert (answer.status, answer.error) == (404, "no such model")
    assert not pair.engines[1].requests


def test_a_stream_passes_as_it_comes(pair: Pair) -> None:
    connection = pair.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps({"model": "stream"}))
    response = connection.getresponse()
    assert response.getheader("content-type", "").startswith("text/event-stream")
    times, events = [], []
    while line := response.readline():
        if line.strip():
            events.append(line)
            times.append(time.monotonic())
    assert events == [f"data: {piece}\n".encode() for piece in range(PIECES)]
    assert times[-1] - times[0] > PAUSE_S * (PIECES - 2)


@pytest.mark.parametrize("model", ["wait", "stream"])
def test_a_client_that_disconnects_aborts_its_request(pair: Pair, model: str) -> None:
    connection = pair.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps({"model": model}))
    if model == "stream":
        assert connection.getresponse().readline() == b"data: 0\n"
    else:
        wait_until(lambda: bool(pair.engines[0].requests))
    assert pair.metric("rollcast_frontend_requests", engine="0") == 1
    connection.close()
    assert pair.engines[0].aborted.wait(5)
    wait_until(lambda: pair.metric("rollcast_frontend_requests", engine="0") == 0)


def test_a_conversation_stays_with_its_engine(pair: Pair) -> None:
    connection = pair.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps({"model": "wait"}))
    wait_until(lambda: bool(pair.engines[0].requests))
    turn = {"role": "user", "content": "a" * 200}
    assert pair.call(messages=[turn]).by == "one"
    connection.close()
    assert pair.engines[0].aborted.wait(5)
    assert pair.call(messages=[turn, turn]).by == "one"
    assert pair.call(messages=[]).by == "zero"


def test_another_engine_answers_for_one_that_refuses(pair: Pair) -> None:
    pair.engines[0].refusing = True
    assert [pair.call().by for _ in range(3)] == ["one"] * 3
    assert len(pair.engines[0].requests) == 1, "it must be avoided for a while"
    assert pair.metric("rollcast_frontend_responses_total", engine="0", status="503") == 1
    assert pair.metric("rollcast_frontend_responses_total", engine="1", status="200") == 3


def test_another_engine_answers_for_one_that_is_gone() -> None:
    with ExitStack() as stack:
        engine = FakeEngine("one")
        address = stack.enter_context(serve_app(engine.app(), host="127.0.0.1", port=0))
        pair = proxied(stack, [engine], [free_address(), address])
        assert [pair.call().by for _ in range(3)] == ["one"] * 3
        health = pair.call("/health", "GET")
        assert health.status == 200
        assert [engine["healthy"] for engine in json.loads(health.body)["engines"]] == [False, True]


def test_nobody_serves(pair: Pair) -> None:
    for engine in pair.engines:
        engine.refusing = True
    answer = pair.call()
    assert (answer.status, answer.error) == (503, "no engine serves: zero sleeps; one sleeps")
    assert pair.call("/health", "GET").status == 503
    pair.engines[1].refusing = False
    assert pair.call().by == "one", "engines to avoid are tried last, not never"


def test_an_engine_that_is_gone_is_named() -> None:
    with ExitStack() as stack:
        address = free_address()
        answer = proxied(stack, [], [address]).call()
        assert answer.status == 503
        assert answer.error.startswith(f"no engine serves: engine 0 at {address}: ")


def test_an_engine_that_does_not_answer_in_time(pair: Pair) -> None:
    with ExitStack() as stack:
        slow = proxied(stack, pair.engines, pair.addresses, read_timeout_s=0.3)
        answer = slow.call(model="wait")
        assert (answer.status, answer.error) == (504, "engine 0 has not answered within 0.3 s")
        assert pair.engines[0].aborted.wait(5)
        assert not pair.engines[1].requests


def test_an_engine_that_stops_in_the_middle_of_a_stream(pair: Pair) -> None:
    answer = pair.call(model="break")
    first, second = answer.body.split(b"\n\n\n\n")
    assert (answer.status, first) == (200, b"data: 0")
    assert json.loads(second.removeprefix(b"data: "))["error"]["message"].startswith("engine 0 stopped answering")
    assert not pair.engines[1].requests


def test_a_body_that_breaks_off_does_not_look_whole(pair: Pair) -> None:
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        pair.call(model="break plain")


def test_a_client_that_does_not_send_its_body(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend_module, "BODY_TIMEOUT_S", 0.2)
    connection = pair.connect()
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", "10")
    connection.endheaders(b"half")
    assert connection.getresponse().status == 408


def test_metrics_are_prometheus_text(pair: Pair) -> None:
    assert pair.call().status == 200
    text = pair.call("/metrics", "GET").body.decode()
    assert 'rollcast_frontend_responses_total{engine="0",status="200"} 1.0' in text


def test_many_requests_are_spread(pair: Pair) -> None:
    connections = [pair.connect() for _ in range(20)]
    for connection in connections:
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": "stream"}))
    assert all(connection.getresponse().read().count(b"data: ") == PIECES for connection in connections)
    counts = [len(engine.requests) for engine in pair.engines]
    assert sum(counts) == 20 and min(counts) >= 8


def test_a_port_in_use_is_named(pair: Pair) -> None:
    with (
        pytest.raises(OSError, match="in use"),
        serve_app(Starlette(), host="127.0.0.1", port=pair.port),
    ):
        pass


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
