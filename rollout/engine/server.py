"""The engine process: a service around one `Engine` (started by the engine's leader rank).

    python -m rollcast.rollout.engine.server FD       # `Launch` as JSON on standard input

Writes one line to the file descriptor FD when it is ready: the address it serves on.
"""

import asyncio
import ctypes
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial

import msgspec
import uvloop

from rollcast.rollout.engine.engine import Engine
from rollcast.rollout.engine.openai.server import OpenAIDoor
from rollcast.rollout.engine.requests import Running
from rollcast.rollout.errors import RollcastError
from rollcast.rollout.protocol.connection import ID_BYTES, LIMIT_BYTES, frame, frames
from rollcast.rollout.protocol.messages import (
    Abandon,
    Abort,
    Call,
    Called,
    Commit,
    Describe,
    DescribeLanding,
    Description,
    Done,
    Failed,
    Fingerprint,
    Fingerprints,
    Generate,
    Generated,
    JoinGroup,
    LandingPlans,
    Launch,
    Prepare,
    Prepared,
    Receive,
    Received,
    Reply,
    Request,
    RunBatch,
    Settle,
    Sleep,
    WakeUp,
)

PR_SET_PDEATHSIG = 1
HEALTH_POLL_S = 0.2


class Service:
    """Answers each request as soon as it is done, in any order."""

    def __init__(self, engine: Engine, *, index: int, openai: str | None) -> None:
        self._engine = engine
        self._index = index
        self._openai = openai
        self._decoder = msgspec.msgpack.Decoder(Request)
        self._encoder = msgspec.msgpack.Encoder()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, host: str) -> str:
        """Accept connections on a free port of this machine; the address."""
        self._server = await asyncio.start_server(self._listen, host, 0, limit=LIMIT_BYTES)
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def run(self) -> None:
        """Serve until vLLM dies."""
        while not self._engine.dead:
            await asyncio.sleep(HEALTH_POLL_S)

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One pool's requests, each with an id before it that its reply has, too."""
        async for message in frames(reader):
            request_id, payload = message[:ID_BYTES], message[ID_BYTES:]
            task = asyncio.create_task(self._answer(writer, request_id, payload))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, writer: asyncio.StreamWriter, request_id: bytes, payload: bytes) -> None:
        try:
            request = self._decoder.decode(payload)
            reply = await (
                self._generate(request, partial(self._send, writer, request_id))
                if isinstance(request, Generate)
                else self._carry_out(request)
            )
        except asyncio.CancelledError:
            reply = Failed("the request was abandoned")
        except Exception as error:
            # A worker that died cancels its calls before vLLM says so. Then no answer: the leader reports the
            # loss, with the root cause from the log.
            await asyncio.sleep(HEALTH_POLL_S)
            if self._engine.dead:
                return
            known = isinstance(error, RollcastError | ValueError)
            reply = Failed(str(error) if known else f"{type(error).__name__}: {error}")
        try:
            self._send(writer, request_id, reply)
        except Exception as error:
            self._send(writer, request_id, Failed(f"the answer cannot be sent: {error}"))

    def _send(self, writer: asyncio.StreamWriter, request_id: bytes, reply: Reply) -> None:
        writer.write(frame(request_id, self._encoder.encode(reply)))

    async def _generate(self, request: Generate, send: Callable[[Reply], None]) -> Reply:
        emit = send if request.stream else None
        running = Running(request.request_id, request.prompt, request.sampling, request.priority, emit)
        return Generated(await self._engine.generate(running, batch=request.batch))

    def _describe(self) -> Description:
        its = self._engine
        return Description(self._index, os.getpid(), its.version, its.torn, its.requests, self._openai)

    async def _carry_out(self, request: Request) -> Reply:
        match request:
            case RunBatch():
                await self._engine.run_batch(request.batch)
            case Abort():
                await self._engine.abort(request.request_ids)
            case Prepare():
                return Prepared(await self._engine.updates.prepare(request.manifest))
            case DescribeLanding():
                return LandingPlans(await self._engine.workers.call("rollcast_describe_landing"))
            case JoinGroup():
                await self._engine.updates.join(request)
            case Receive():
                return Received(await self._engine.updates.receive(request))
            case Commit():
                await self._engine.updates.commit(request.version, timeout_s=request.timeout_s)
            case Abandon():
                await self._engine.updates.abandon(request.text)
            case Settle():
                self._engine.updates.settle()
            case Describe():
                return self._describe()
            case Sleep():
                await self._engine.sleep(request.level)
            case WakeUp():
                await self._engine.wake_up(request.tags)
            case Call():
                return Called(await self._engine.workers.call(request.method, *request.args))
            case Fingerprint():
                return Fingerprints(await self._engine.workers.call("rollcast_fingerprint"))
        return Done()


async def serve(launch: Launch, ready_fd: int) -> None:
    """Start the engine, announce the address, serve until told to stop (SIGTERM) or vLLM dies."""
    door = None if launch.openai_port is None else OpenAIDoor(launch)
    engine = Engine.start(launch)
    try:
        await engine.watch()
        if door is not None:
            await engine.open_to_openai(door)
        # What start-up has made stays. Looking through it again and again would stop the loop for half a second.
        gc.collect()
        gc.freeze()
        service = Service(engine, index=launch.engine, openai=door and door.address)
        address = await service.open(launch.host)
        with os.fdopen(ready_fd, "w") as ready:
            ready.write(f"{address}\n")
        serving = asyncio.create_task(service.run())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
        await asyncio.wait([serving])
    finally:
        engine.shutdown()


def die_with_parent() -> None:
    """Ask Linux to send SIGTERM when the leader dies, however it dies."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Entry point of the engine process."""
    die_with_parent()
    # Until `serve` takes over: vLLM's processes, which are starting, must not outlive this one.
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(os.getpgrp(), signal.SIGKILL))
    launch = msgspec.json.decode(sys.stdin.buffer.read(), type=Launch)
    try:
        uvloop.run(serve(launch, int(sys.argv[1])))
    except BaseException:
        traceback.print_exc()
    # No interpreter teardown: vLLM's finalizers raise in it, and bury the log's last words.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
