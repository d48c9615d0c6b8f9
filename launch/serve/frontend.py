"""A balancing reverse proxy in front of the engines' own OpenAI-compatible servers (rank 0 of the serve job)."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import aiohttp
import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send
from yarl import URL

from rollcast.launch.serve.balancer import Balancer, prompt_prefix

ENGINE_HEADER = "x-rollcast-engine"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 3
BODY_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 5.0
HEALTH_TIMEOUT_S = 5.0
# Less than uvicorn's 5 s: a request must not be sent on a connection that the engine is about to close.
KEEP_ALIVE_S = 2.0
# Headers of one connection rather than of the request, and those that the next client or server writes itself.
HOP_BY_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
NOT_FORWARDED = HOP_BY_HOP | {b"host", b"content-length", b"expect"}
NOT_RETURNED = HOP_BY_HOP | {b"date", b"server"}
EVENT_STREAM = "text/event-stream"

log = logging.getLogger(__name__)


class Frontend:
    """Forwards each request, untouched, to one engine's own server, and its response back as it comes.

        addresses = [engine.openai for engine in pool.describe()]
        frontend = Frontend(addresses, registry=pool.metrics.registry)
        with serve_app(frontend.app(), host="127.0.0.1", port=8000) as address: ...

    The engines' servers write the policy version into header and body, and take part in syncs; a header names the
    engine that answered. A request whose engine cannot be reached, or refuses with status 503, goes to another one; if
    none is left, its client gets 503 with the reasons. A client that disconnects aborts its request in the engine.
    Everything runs on one event loop.
    """

    _session: aiohttp.ClientSession

    def __init__(
        self, addresses: Sequence[str], *, registry: CollectorRegistry, read_timeout_s: float = 3600.0
    ) -> None:
        """`addresses` are the engines' base URLs ("http://host:port/v1"), by engine; metrics go into `registry`.

        An engine that sends nothing for `read_timeout_s` has failed: without `stream`, that is the time of a response.
        """
        self._addresses = [address.removesuffix("/").removesuffix("/v1") for address in addresses]
        self._balancer = Balancer(len(addresses))
        self._timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT_S, sock_read=read_timeout_s)
        self._registry = registry
        self._requests = Gauge(
            "rollcast_frontend_requests", "Requests under way, by engine.", ["engine"], registry=registry
        )
        self._responses = Counter(
            "rollcast_frontend_responses", "Responses, by engine and status.", ["engine", "status"], registry=registry
        )

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Mount("/", app=self._forward),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        # No limit: the engines queue requests, and know which to run first.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        # The client's own headers pass, and no other.
        skipped = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=self._timeout,
            auto_decompress=False,
            skip_auto_headers=skipped,
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as self._session:
            yield

    async def _health(self, request: Request) -> Response:
        """`GET /health`: 200 if at least one engine serves."""
        healthy = await asyncio.gather(*map(self._is_healthy, range(len(self._addresses))))
        engines = [
            {"engine": engine, "address": f"{address}/v1", "healthy": healthy[engine], "requests": requests}
            for engine, (address, requests) in enumerate(zip(self._addresses, self._balancer.loads, strict=True))
        ]
        return JSONResponse({"engines": engines}, status_code=200 if any(healthy) else 503)

    async def _is_healthy(self, engine: int) -> bool:
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            async with self._session.get(f"{self._addresses[engine]}/health", timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _metrics(self, request: Request) -> Response:
        """`GET /metrics`, for Prometheus."""
        return PlainTextResponse(generate_latest(self._registry))

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer any other request (ASGI)."""
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        request = Request(scope, receive)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await request.body()
        except ClientDisconnect:
            return
        except TimeoutError:
            response = _error(408, f"no complete request within {BODY_TIMEOUT_S:g} s", kind="invalid_request_error")
            await response(scope, receive, send)
            return
        answering = asyncio.create_task(self._answer(request, body, send))
        disconnected = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait({answering, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            disconnected.cancel()
            # This closes the connection to the engine, which aborts the request there.
            cancelled = answering.cancel()
            await asyncio.wait({answering, disconnected})
        if not cancelled:
            answering.result()

    async def _answer(self, request: Request, body: bytes, send: Send) -> None:
        """Try the engines in turn until one answers."""
        prefix = prompt_prefix(body)
        refusals: list[str] = []
        for engine in self._balancer.candidates(prefix):
            with self._balancer.request(engine, prefix), self._requests.labels(engine).track_inprogress():
                try:
                    response = await self._request(engine, request, body)
                except aiohttp.SocketTimeoutError:
                    # It may have done its work: another engine would do the same again, as slowly.
                    message = f"engine {engine} has not answered within {self._timeout.sock_read:g} s"
                    await _error(504, message, kind="timeout_error")(request.scope, request.receive, send)
                    return
                except (aiohttp.ClientError, OSError) as error:
                    refusal = f"engine {engine} at {self._addresses[engine]}: {error or type(error).__name__}"
                else:
                    async with response:
                        self._responses.labels(engine, response.status).inc()
                        if response.status != 503:
                            await _return(response, engine, send)
                            return
                        refusal = await _error_message(response)
            log.warning("trying another engine: %s", refusal)
            self._balancer.avoid(engine)
            refusals.append(refusal)
        message = f"no engine serves: {'; '.join(refusals)}"
        await _error(503, message, kind="service_unavailable")(request.scope, request.receive, send)

    async def _request(self, engine: int, request: Request, body: bytes) -> aiohttp.ClientResponse:
        """Send the request to an engine; return its response once the headers are there."""
        path = request.scope.get("raw_path") or request.scope["path"].encode()
        query = request.scope["query_string"]
        target = path + (b"?" + query if query else b"")
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in request.headers.raw
            if name not in NOT_FORWARDED
        ]
        return await self._session.request(
            request.method,
            URL(self._addresses[engine] + target.decode("latin-1"), encoded=True),
            headers=headers,
            data=body or None,
            allow_redirects=False,
        )


async def _return(response: aiohttp.ClientResponse, engine: int, send: Send) -> None:
    """Pass an engine's response to the client, piece by piece as it comes."""
    headers = [(name.lower(), value) for name, value in response.raw_headers if name.lower() not in NOT_RETURNED]
    headers.append((ENGINE_HEADER.encode(), str(engine).encode()))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    try:
        async for piece in response.content.iter_any():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except (aiohttp.ClientError, TimeoutError) as error:
        if response.content_type != EVENT_STREAM:
            # The server closes the connection before the body is complete: the client must not take it for whole.
            raise
        message = f"engine {engine} stopped answering: {error or type(error).__name__}"
        event = f"\n\ndata: {json.dumps(_error_content(message, kind='service_unavailable'))}\n\n"
        await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _error_message(response: aiohttp.ClientResponse) -> str:
    """Return the message of an OpenAI error, or the body as it is."""
    text = ""
    try:
        text = (await response.read()).decode(errors="replace")
        return str(json.loads(text)["error"]["message"])
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError):
        return text


def _error_content(message: str, *, kind: str) -> dict[str, dict[str, str | None]]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _error(status: int, message: str, *, kind: str) -> JSONResponse:
    """Return an OpenAI error."""
    return JSONResponse(_error_content(message, kind=kind), status_code=status)


@contextmanager
def serve_app(app: Starlette, *, host: str, port: int) -> Iterator[str]:
    """Serve on a thread for as long as the context is open; yield the URL. Port 0 is a free one.

    Raises `OSError` if the port is in use, or the server does not start in time.
    """
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_TIMEOUT_S, lifespan="on"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name="frontend", daemon=True)
        thread.start()
        end = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > end:
                raise OSError(f"the server at {host}:{port} did not start")
            time.sleep(0.01)
        try:
            yield f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(START_TIMEOUT_S)
