"""The policy version in the responses of vLLM's own server, as ASGI middleware (engine process)."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from rollcast.rollout.engine.openai.client import RESPONSE_VERSIONS, ResponseVersions
from rollcast.rollout.protocol.sampling import VERSION_HEADER

JSON, EVENTS = "application/json", "text/event-stream"
EVENT = "data: "
BODY_HEADERS = (b"content-type", b"content-length")
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class PolicyVersionMiddleware:
    """Adds the versions of the weights that generated a response.

    `policy_version`, and the header, are the newest token's version; `policy_spans` of a choice are [version, first
    token] pairs. In a stream the header is the first token's version, and each event has the version of its own last
    token: what comes before the first token is held back until then. A request that is refused before its response
    has started gets status 503.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """Handle one connection of the server."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        versions = ResponseVersions()
        RESPONSE_VERSIONS.set(versions)
        response = _Response(versions, send, generates=scope["method"] == "POST")
        try:
            await self._app(scope, receive, response.send)
        except Exception:
            if not response.started and versions.refusal:
                await response.refuse()
            # Starlette raises an error again that it has answered; the server would close the connection.
            if not response.refused:
                raise


class _Response:
    """Passes on one response. Its head is held back until the body shows which headers belong in it."""

    def __init__(self, versions: ResponseVersions, send: Send, *, generates: bool) -> None:
        self._versions = versions
        self._send = send
        self._generates = generates
        self._head: Message | None = None
        self._content_type = ""
        self._body = b""
        self.started = False
        """Whether the client has received the head."""
        self.refused = False

    async def send(self, message: Message) -> None:
        """Take one message of the application."""
        if message["type"] == "http.response.start":
            self._head = message
            content_type = dict(message["headers"]).get(b"content-type", b"")
            self._content_type = content_type.decode().partition(";")[0]
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._head is not None and self._versions.refusal:
            await self.refuse()
        elif not self.refused:
            await (self._send_whole(message) if self._content_type == JSON else self._send_piece(message))

    async def refuse(self) -> None:
        """Send the reason with status 503, in place of the application's own response."""
        self.refused = True
        error = {"message": self._versions.refusal, "type": "ServiceUnavailableError", "param": None, "code": 503}
        # Headers for browsers (CORS) stay.
        kept = [header for header in (self._head or {}).get("headers", ()) if header[0] not in BODY_HEADERS]
        headers = [*kept, (b"content-type", JSON.encode())]
        self._head = {"type": "http.response.start", "status": 503, "headers": headers}
        await self._send_object(json.dumps({"error": error}).encode())

    async def _send_whole(self, message: Message) -> None:
        """Send a JSON object once it is complete."""
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        plain = self._versions.version is None
        await self._send_object(self._body if plain else _with_versions(self._body, self._versions))

    async def _send_piece(self, message: Message) -> None:
        """Send events as they come, from the first token on, and bodies of other kinds as they are."""
        self._body += message.get("body", b"")
        early = self._content_type == EVENTS and self._generates and self._versions.version is None
        if early and message.get("more_body"):
            return
        if not self.started:
            await self._send_head({})
        body, self._body = self._body, b""
        if self._content_type == EVENTS and self._versions.version is not None:
            body = "\n".join(_line_with_version(line, self._versions) for line in body.decode().split("\n")).encode()
        await self._send({**message, "body": body})

    async def _send_object(self, body: bytes) -> None:
        await self._send_head({b"content-length": str(len(body)).encode()})
        await self._send({"type": "http.response.body", "body": body})

    async def _send_head(self, headers: dict[bytes, bytes]) -> None:
        assert self._head is not None
        self.started = True
        if self._versions.version is not None:
            headers = {**headers, VERSION_HEADER.encode(): str(self._versions.version).encode()}
        kept = [(name, value) for name, value in self._head["headers"] if name not in headers]
        await self._send({**self._head, "headers": [*kept, *headers.items()]})
        self._head = None


def _with_versions(body: bytes, versions: ResponseVersions) -> bytes:
    """Return a JSON body with its version, and the spans of each choice."""
    content = json.loads(body)
    if not isinstance(content, dict):
        return body
    choices = content.get("choices", [])
    if len(choices) == versions.samples:
        for choice in choices:
            choice["policy_spans"] = versions.spans[choice["index"]]
    return json.dumps(content | {"policy_version": versions.version}).encode()


def _line_with_version(line: str, versions: ResponseVersions) -> str:
    """Return a line of an event stream, with the version if it is a JSON object."""
    if not line.startswith(EVENT + "{"):
        return line
    event = json.loads(line.removeprefix(EVENT))
    # Events of several samples alternate, and are not always from one version.
    choices = [choice["index"] for choice in event.get("choices", ()) if choice["index"] in versions.spans]
    version = versions.spans[choices[0]][-1][0] if choices else versions.version
    return EVENT + json.dumps(event | {"policy_version": version})
