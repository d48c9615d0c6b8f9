"""The policy version in the answers of vLLM's own server, as ASGI middleware (engine process)."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from rollcast.rollout.engine.openai.client import TOLD, Told
from rollcast.rollout.protocol.sampling import VERSION_HEADER

JSON, EVENTS = "application/json", "text/event-stream"
EVENT = "data: "
OF_BODY = (b"content-type", b"content-length")
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class TellVersions:
    """Says with which weights an answer was made.

    `policy_version`, and the header, are the newest token's version; `policy_spans` of a choice are [version, first
    token] pairs. In a stream the header is the first token's version, and each event has the version of its own last
    token: what comes before the first token waits for it. What is refused before it has begun is status 503.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """One connection of the server's."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = Told()
        TOLD.set(told)
        answer = _Answer(told, send, generates=scope["method"] == "POST")
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            if not answer.begun and told.refusal:
                await answer.refuse()
            # Starlette raises again what it has answered; the server would close the connection.
            if not answer.refused:
                raise


class _Answer:
    """A response on its way out. Its head waits for the body, which says what belongs in it."""

    def __init__(self, told: Told, send: Send, *, generates: bool) -> None:
        self._told = told
        self._send = send
        self._generates = generates
        self._head: Message | None = None
        self._kind = ""
        self._body = b""
        self.begun = False
        """Whether the client has heard something."""
        self.refused = False

    async def send(self, message: Message) -> None:
        """Take one message of the application's."""
        if message["type"] == "http.response.start":
            self._head = message
            self._kind = dict(message["headers"]).get(b"content-type", b"").decode().partition(";")[0]
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._head is not None and self._told.refusal:
            await self.refuse()
        elif not self.refused:
            await (self._send_whole(message) if self._kind == JSON else self._send_piece(message))

    async def refuse(self) -> None:
        """Answer with the reason and status 503, whatever the application says."""
        self.refused = True
        error = {"message": self._told.refusal, "type": "ServiceUnavailableError", "param": None, "code": 503}
        # Those for browsers stay.
        kept = [its for its in (self._head or {}).get("headers", ()) if its[0] not in OF_BODY]
        headers = [*kept, (b"content-type", JSON.encode())]
        self._head = {"type": "http.response.start", "status": 503, "headers": headers}
        await self._send_object(json.dumps({"error": error}).encode())

    async def _send_whole(self, message: Message) -> None:
        """An object goes when it is complete."""
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        await self._send_object(self._body if self._told.version is None else _with_versions(self._body, self._told))

    async def _send_piece(self, message: Message) -> None:
        """Events go as they come, from the first token on, and so does what is none of ours."""
        self._body += message.get("body", b"")
        early = self._kind == EVENTS and self._generates and self._told.version is None
        if early and message.get("more_body"):
            return
        if not self.begun:
            await self._send_head({})
        body, self._body = self._body, b""
        if self._kind == EVENTS and self._told.version is not None:
            body = "\n".join(_told_line(line, self._told) for line in body.decode().split("\n")).encode()
        await self._send({**message, "body": body})

    async def _send_object(self, body: bytes) -> None:
        await self._send_head({b"content-length": str(len(body)).encode()})
        await self._send({"type": "http.response.body", "body": body})

    async def _send_head(self, headers: dict[bytes, bytes]) -> None:
        assert self._head is not None
        self.begun = True
        if self._told.version is not None:
            headers = {**headers, VERSION_HEADER.encode(): str(self._told.version).encode()}
        kept = [(name, value) for name, value in self._head["headers"] if name not in headers]
        await self._send({**self._head, "headers": [*kept, *headers.items()]})
        self._head = None


def _with_versions(body: bytes, told: Told) -> bytes:
    """A response with its version, and each choice with its spans."""
    content = json.loads(body)
    if not isinstance(content, dict):
        return body
    choices = content.get("choices", [])
    if len(choices) == told.samples:
        for choice in choices:
            choice["policy_spans"] = told.spans[choice["index"]]
    return json.dumps(content | {"policy_version": told.version}).encode()


def _told_line(line: str, told: Told) -> str:
    """A line of an event stream; with the version, if it is an object."""
    if not line.startswith(EVENT + "{"):
        return line
    event = json.loads(line.removeprefix(EVENT))
    # Samples take turns, and are not always of one version.
    places = [choice["index"] for choice in event.get("choices", ()) if choice["index"] in told.spans]
    version = told.spans[places[0]][-1][0] if places else told.version
    return EVENT + json.dumps(event | {"policy_version": version})
