"""The engine process: one `Engine`, and the server that trainers' pools connect to (started by the leader rank).

    python -m rollcast.rollout.engine.server FD       # `EngineSpec` as JSON on standard input

Writes one line to the file descriptor FD when it is ready: the address that it listens on.
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
from rollcast.rollout.engine.openai.server import OpenAIServer
from rollcast.rollout.engine.requests import PoolRequest
from rollcast.rollout.errors import EngineError, Failure, RollcastError
from rollcast.rollout.protocol.connection import ID_BYTES, LIMIT_BYTES, frame, frames
from rollcast.rollout.protocol.messages import (
    Abort,
    AbortSync,
    Call,
    Called,
    Commit,
    Describe,
    DescribeLanding,
    Done,
    EngineSpec,
    Failed,
    Finalize,
    Fingerprint,
    Fingerprints,
    Generate,
    Generated,
    JoinGroup,
    LandingPlans,
    Prepare,
    Prepared,
    Receive,
    Received,
    Reply,
    Request,
    RunBatch,
    Sleep,
    WakeUp,
)

PR_SET_PDEATHSIG = 1
HEALTH_POLL_S = 0.2
# `Failure.phase` of each request.
PHASES: dict[type[Request], str] = {
    Generate: "generate",
    RunBatch: "generate",
    Abort: "generate",
    Prepare: "prepare",
    DescribeLanding: "prepare",
    JoinGroup: "join",
    Receive: "receive",
    Commit: "commit",
    Finalize: "finalize",
    AbortSync: "abort",
    Describe: "describe",
    Fingerprint: "fingerprint",
    Call: "call",
    Sleep: "sleep",
    WakeUp: "wake_up",
}


class EngineServer:
    """Serves the requests of all trainers' pools. Replies to each as soon as it is done, in any order."""

    def __init__(self, engine: Engine, *, index: int, openai: str | None) -> None:
        self._engine = engine
        self._index = index
        self._openai = openai
        self._decoder = msgspec.msgpack.Decoder(Request)
        self._encoder = msgspec.msgpack.Encoder()
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, host: str) -> str:
        """Accept connections on a free port of this host. Return the address."""
        self._server = await asyncio.start_server(self._serve, host, 0, limit=LIMIT_BYTES)
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def wait_until_dead(self) -> None:
        """Serve until vLLM dies."""
        while not self._engine.dead:
            await asyncio.sleep(HEALTH_POLL_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one pool's connection. Each request follows an id, which its replies repeat."""
        async for message in frames(reader):
            request_id, payload = message[:ID_BYTES], message[ID_BYTES:]
            task = asyncio.create_task(self._reply(writer, request_id, payload))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _reply(self, writer: asyncio.StreamWriter, request_id: bytes, payload: bytes) -> None:
        phase = ""
        try:
            request = self._decoder.decode(payload)
            phase = PHASES[type(request)]
            reply = await (
                self._generate(request, partial(self._send, writer, request_id))
                if isinstance(request, Generate)
                else self._carry_out(request, phase)
            )
        except asyncio.CancelledError:
            reply = self._failed("the request was cancelled", phase)
        except Exception as error:
            # A worker that died cancels its calls before vLLM notices. Then no reply: the leader reports the loss,
            # with the root cause from the log.
            await asyncio.sleep(HEALTH_POLL_S)
            if self._engine.dead:
                return
            reply = self._failed(error, phase)
        try:
            self._send(writer, request_id, reply)
        except Exception as error:
            self._send(writer, request_id, self._failed(f"the reply cannot be sent: {error}", phase))

    def _failed(self, error: Exception | str, phase: str) -> Failed:
        """Return the reply for an error: an `EngineError` keeps its failures and its message."""
        if isinstance(error, EngineError) and error.failures:
            failures = [msgspec.structs.replace(each, phase=each.phase or phase) for each in error.failures]
            return Failed(failures, str(error))
        named = isinstance(error, str | RollcastError | ValueError)
        text = str(error) if named else f"{type(error).__name__}: {error}"
        return Failed([Failure(text=text, engine=self._index, phase=phase)])

    def _send(self, writer: asyncio.StreamWriter, request_id: bytes, reply: Reply) -> None:
        writer.write(frame(request_id, self._encoder.encode(reply)))

    async def _generate(self, request: Generate, send: Callable[[Reply], None]) -> Reply:
        emit = send if request.stream else None
        pool_request = PoolRequest(request.request_id, request.prompt, request.sampling, request.priority, emit)
        return Generated(await self._engine.generate(pool_request, batch=request.batch))

    async def _carry_out(self, request: Request, phase: str) -> Reply:
        match request:
            case RunBatch():
                await self._engine.run_batch(request.batch)
            case Abort():
                await self._engine.abort(request.request_ids)
            case Prepare():
                return Prepared(await self._engine.sync.prepare(request.manifest, request.kept))
            case DescribeLanding():
                return LandingPlans(await self._engine.workers.call("rollcast_describe_landing", phase=phase))
            case JoinGroup():
                await self._engine.sync.join(request)
            case Receive():
                return Received(await self._engine.sync.receive(request))
            case Commit():
                await self._engine.sync.commit(request.version, timeout_s=request.timeout_s)
            case Finalize():
                self._engine.sync.finalize()
            case AbortSync():
                await self._engine.sync.abort(request.reason)
            case Describe():
                return self._engine.describe(pid=os.getpid(), openai=self._openai)
            case Sleep():
                await self._engine.sleep(request.level)
            case WakeUp():
                await self._engine.wake_up(request.tags)
            case Call():
                return Called(await self._engine.workers.call(request.method, *request.args, phase=phase))
            case Fingerprint():
                return Fingerprints(await self._engine.workers.call("rollcast_fingerprint", phase=phase))
        return Done()


async def serve(spec: EngineSpec, ready_fd: int) -> None:
    """Start the engine, write the address to `ready_fd`, serve until SIGTERM or until vLLM dies."""
    openai = None if spec.openai_port is None else OpenAIServer(spec)
    engine = Engine.start(spec)
    try:
        await engine.connect_workers()
        if openai is not None:
            await engine.serve_openai(openai)
        # Objects from start-up stay alive: a collection that scanned them would stop the loop for half a second.
        gc.collect()
        gc.freeze()
        server = EngineServer(engine, index=spec.engine, openai=openai and openai.address)
        address = await server.listen(spec.host)
        with os.fdopen(ready_fd, "w") as ready:
            ready.write(f"{address}\n")
        serving = asyncio.create_task(server.wait_until_dead())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
        await asyncio.wait([serving])
    finally:
        engine.shutdown()


def die_with_parent() -> None:
    """Ask Linux to send SIGTERM to this process when its leader dies, however it dies."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Run the engine process."""
    die_with_parent()
    # Until `serve` takes over: vLLM's processes, which are starting, must not outlive this one.
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(os.getpgrp(), signal.SIGKILL))
    try:
        spec = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineSpec)
        uvloop.run(serve(spec, int(sys.argv[1])))
    except BaseException:
        traceback.print_exc()
    # No interpreter teardown: vLLM's finalizers raise in it, and hide the cause at the end of the log.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
