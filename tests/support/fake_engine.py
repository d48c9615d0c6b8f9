"""An upstream of the front end that is no engine: it answers, streams or waits as it is asked to."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PIECES = 5
PAUSE_S = 0.2


@dataclass
class FakeEngine:
    """A server that does what the field "model" of a request asks for."""

    name: str
    refusing: bool = False
    requests: list[Request] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    aborted: threading.Event = field(default_factory=threading.Event)

    def app(self) -> Starlette:
        everything = Route("/v1/{path:path}", self.answer, methods=["GET", "POST", "DELETE"])
        return Starlette(routes=[Route("/health", self.health), everything])

    async def health(self, request: Request) -> Response:
        return Response(status_code=503 if self.refusing else 200)

    async def answer(self, request: Request) -> Response:
        self.requests.append(request)
        self.bodies.append(body := await request.body())
        if self.refusing:
            error = {"message": f"{self.name} sleeps", "type": "ServiceUnavailableError", "param": None, "code": 503}
            return JSONResponse({"error": error}, status_code=503)
        match json.loads(body or b"{}").get("model"):
            case "stream":
                return StreamingResponse(self.pieces(), media_type="text/event-stream")
            case "break":
                return StreamingResponse(self.pieces(broken=True), media_type="text/event-stream")
            case "break plain":
                return StreamingResponse(self.pieces(broken=True), media_type="application/octet-stream")
            case "wait":
                await self.wait(request)
            case "bad":
                return JSONResponse({"error": {"message": "no such model"}}, status_code=404)
        return JSONResponse({"by": self.name}, headers={"x-rollcast-version": "7"})

    async def pieces(self, *, broken: bool = False) -> AsyncIterator[str]:
        try:
            for piece in range(PIECES):
                yield f"data: {piece}\n\n"
                await asyncio.sleep(PAUSE_S)
                if broken:
                    raise RuntimeError
        except asyncio.CancelledError:
            self.aborted.set()
            raise

    async def wait(self, request: Request) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        self.aborted.set()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def by(self) -> str:
        return json.loads(self.body)["by"]

    @property
    def error(self) -> str:
        return json.loads(self.body)["error"]["message"]


def free_address() -> str:
    """An address that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"
