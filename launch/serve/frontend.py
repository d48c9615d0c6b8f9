"""An OpenAI-compatible server in front of a pool: any engine answers, and says with which policy version."""

import asyncio
import itertools
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from rollcast.launch.serve.openai_api import ChatRequest, CompletionRequest, Request, error, usage
from rollcast.launch.serve.wording import CHAT, PLAIN, Wording
from rollcast.rollout import Completion, EngineError, Pool, Sampling
from rollcast.rollout.protocol.sampling import VERSION_HEADER

START_TIMEOUT_S = 30.0
POLL_S = 0.5


class FrontDoor:
    """Turns OpenAI's requests into the pool's.

        door = FrontDoor(pool, tokenizer, model="Qwen3-8B", max_model_len=4096)
        with served(door.app(), host="127.0.0.1", port=8000) as address: ...

    Syncs go on meanwhile: a response may be of several versions, and tells which. Everything runs on one event loop.
    """

    def __init__(self, pool: Pool, tokenizer: Any, *, model: str, max_model_len: int) -> None:
        self._pool = pool
        self._tokenizer = tokenizer
        self._model = model
        self._max_model_len = max_model_len
        self._numbers = itertools.count()

    def app(self) -> FastAPI:
        """The server's application."""
        app = FastAPI(title="rollcast")
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/completions")(self.complete)
        app.get("/v1/models")(self.models)
        app.get("/health")(self.health)
        app.get("/metrics")(self.metrics)
        app.exception_handler(RequestValidationError)(refused)
        app.exception_handler(ValueError)(refused)
        app.exception_handler(EngineError)(unavailable)
        return app

    async def chat(self, body: ChatRequest, request: HttpRequest) -> Response:
        """`POST /v1/chat/completions`."""
        if not self._tokenizer.chat_template:
            raise ValueError("the model's tokenizer has no chat template: use /v1/completions")
        messages = [message.plain() for message in body.messages]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = self._tokenizer.encode(text, add_special_tokens=False)
        return await self._answer(body, prompt, CHAT, request, logprobs=body.logprobs)

    async def complete(self, body: CompletionRequest, request: HttpRequest) -> Response:
        """`POST /v1/completions`."""
        prompt = self._tokenizer.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        return await self._answer(body, prompt, PLAIN, request, logprobs=body.logprobs is not None)

    async def models(self) -> dict[str, Any]:
        """`GET /v1/models`."""
        model = {"id": self._model, "object": "model", "owned_by": "rollcast", "max_model_len": self._max_model_len}
        return {"object": "list", "data": [model]}

    async def health(self) -> dict[str, Any]:
        """`GET /health`: every engine's version and state; an error if one does not answer or serve."""
        engines = await asyncio.to_thread(self._pool.describe)
        for engine in engines:
            if engine.torn:
                raise EngineError(engine.torn)
        return {"engines": [{"version": its.version, "requests": its.requests} for its in engines]}

    async def metrics(self) -> PlainTextResponse:
        """`GET /metrics`, for Prometheus."""
        return PlainTextResponse(self._pool.metrics.text())

    async def _answer(
        self, body: Request, prompt: list[int], wording: Wording, request: HttpRequest, *, logprobs: bool
    ) -> Response:
        room = self._max_model_len - len(prompt)
        if room < 1:
            raise ValueError(f"the prompt has {len(prompt)} tokens, but the model takes {self._max_model_len} in all")
        sampling = body.sampling(room=room)
        head = {"id": f"{wording.prefix}-{next(self._numbers)}", "created": int(time.time()), "model": self._model}
        if body.stream:
            pieces = self._stream(body, prompt, sampling, wording, head)
            # Of the first token: a stream's headers come before the rest is known.
            version, first = await anext(pieces)
            events = _chained(first, pieces)
            return StreamingResponse(events, media_type="text/event-stream", headers={VERSION_HEADER: str(version)})
        group = await self._group(prompt, sampling, body.priority, request)
        choices = [wording.choice(self._tokenizer, index, its, logprobs=logprobs) for index, its in enumerate(group)]
        tokens = sum(len(its.token_ids) for its in group)
        version = max(its.versions[-1] for its in group)
        content = head | {"object": wording.kind, "choices": choices, "usage": usage(len(prompt), tokens)}
        return JSONResponse(content | {"policy_version": version}, headers={VERSION_HEADER: str(version)})

    async def _group(
        self, prompt: list[int], sampling: Sampling, priority: int, request: HttpRequest
    ) -> list[Completion]:
        """The completions; the request ends when its client goes away."""
        request_id = f"door-{next(self._numbers)}"
        future = self._pool.submit(prompt, sampling, request_id=request_id, priority=priority)
        answer = asyncio.wrap_future(future)
        while not (await asyncio.wait([answer], timeout=POLL_S))[0]:
            if await request.is_disconnected():
                self._pool.abort([request_id])
        return answer.result()

    async def _stream(
        self, body: Request, prompt: list[int], sampling: Sampling, wording: Wording, head: dict[str, Any]
    ) -> AsyncGenerator[tuple[int, str], None]:
        """Version and event of every piece; the version is of the piece's last token."""
        head = head | {"object": wording.stream_kind}
        token_ids: list[int] = []
        shown: str | None = None
        async for piece in self._pool.stream(prompt, sampling, priority=body.priority):
            token_ids += piece.token_ids
            text = wording.text(self._tokenizer, token_ids, whole=piece.finish_reason is not None)
            choice = wording.delta(text[len(shown or "") :], piece.finish_reason, first=shown is None)
            shown = text
            version = piece.spans[-1][0]
            yield version, _event(head | {"choices": [choice], "policy_version": version})
        if body.stream_options is not None and body.stream_options.include_usage:
            yield 0, _event(head | {"choices": [], "usage": usage(len(prompt), len(token_ids))})
        yield 0, "data: [DONE]\n\n"


async def _chained(first: str, more: AsyncGenerator[tuple[int, str], None]) -> AsyncGenerator[str, None]:
    try:
        yield first
        async for _, event in more:
            yield event
    finally:
        await more.aclose()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def refused(request: HttpRequest, problem: Exception) -> JSONResponse:
    """The client's mistake."""
    details = problem.errors() if isinstance(problem, RequestValidationError) else []
    words = "; ".join(f"{'.'.join(map(str, its['loc'][1:]))}: {its['msg']}" for its in details)
    return JSONResponse(error(words or str(problem), kind="invalid_request_error"), status_code=400)


async def unavailable(request: HttpRequest, problem: Exception) -> JSONResponse:
    """An engine's words."""
    return JSONResponse(error(str(problem), kind="service_unavailable"), status_code=503)


@contextmanager
def served(app: FastAPI, *, host: str, port: int) -> Iterator[str]:
    """Serve on a thread for as long as the context is open; the address (of port 0: a free port's)."""
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, name="front-door", daemon=True)
    thread.start()
    end = time.monotonic() + START_TIMEOUT_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > end:
            raise OSError(f"the front door could not be opened at {host}:{port}: is the port in use?")
        time.sleep(0.01)
    try:
        yield f"http://{host}:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
