"""Replies of the engine process, failures as records, and what it is started with."""

import asyncio
import os
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from rollcast.rollout import EngineError, RolloutConfig
from rollcast.rollout.engine.requests import engine_error
from rollcast.rollout.engine.server import PHASES, EngineServer
from rollcast.rollout.errors import Failure
from rollcast.rollout.protocol.connection import ID_BYTES, frame, frames
from rollcast.rollout.protocol.messages import Done, EngineSpec, Failed, Reply, Request, RunBatch, WakeUp

WORKER_FAILURES = [Failure(text="it stumbled", engine=2, worker=rank, phase="commit") for rank in (0, 1)]


class FakeEngine:
    """Raises `error`, if there is one, in every request."""

    dead = False

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    async def run_batch(self, batch: str) -> None:
        if self.error:
            raise self.error

    async def wake_up(self, tags: list[str]) -> None:
        await self.run_batch("")


async def request(server: EngineServer, payload: bytes) -> Reply:
    """Return the reply to one request."""
    host, _, port = (await server.listen("127.0.0.1")).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    request_id = (7).to_bytes(ID_BYTES, "big")
    writer.write(frame(request_id, payload))
    message = await anext(frames(reader))
    writer.close()
    assert message[:ID_BYTES] == request_id
    return msgspec.msgpack.decode(message[ID_BYTES:], type=Reply)


@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (None, Done()),
        (ValueError("too long"), Failed([Failure(text="too long", engine=2, phase="wake_up")])),
        (KeyError("a"), Failed([Failure(text="KeyError: 'a'", engine=2, phase="wake_up")])),
        (
            engine_error(2, "sleeps: wake it"),
            Failed([Failure(text="sleeps: wake it", engine=2, phase="wake_up")], "engine 2 sleeps: wake it"),
        ),
        (EngineError("engine 2: all", failures=WORKER_FAILURES), Failed(WORKER_FAILURES, "engine 2: all")),
    ],
)
def test_a_failure_is_a_record_with_engine_worker_and_phase(error: Exception | None, reply: Reply) -> None:
    engine: Any = FakeEngine(error)
    server = EngineServer(engine, index=2, openai=None)
    assert asyncio.run(request(server, msgspec.msgpack.encode(WakeUp([])))) == reply


def test_a_batch_fails_in_generating() -> None:
    engine: Any = FakeEngine(ValueError("too long"))
    server = EngineServer(engine, index=2, openai=None)
    reply = asyncio.run(request(server, msgspec.msgpack.encode(RunBatch("a"))))
    assert isinstance(reply, Failed) and reply.failures[0].phase == "generate"


def test_every_request_has_a_phase() -> None:
    assert set(PHASES) == set(get_args(Request))


def test_a_request_that_cannot_be_read_gets_a_reply() -> None:
    engine: Any = FakeEngine(None)
    reply = asyncio.run(request(EngineServer(engine, index=2, openai=None), b"\x01"))
    assert isinstance(reply, Failed) and reply.failures[0].engine == 2


def test_an_engine_is_started_with_the_jobs_whole_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    path: Any = tmp_path
    config = RolloutConfig(
        model=path,
        dtype="float32",
        openai_port=9000,
        openai_flags=("--served-model-name", "it"),
        lora_rank=8,
        lora_versions=2,
        engine_args={"compilation_config": {"level": 0}},
    )
    spec = EngineSpec(config=config, engine=3, host="127.0.0.1")
    received = msgspec.json.decode(msgspec.json.encode(spec, enc_hook=os.fspath), type=EngineSpec)
    assert received.config.model == str(tmp_path) and received.config.lora_rank == 8
    assert list(received.config.openai_flags) == ["--served-model-name", "it"]
    assert received.config.engine_args == {"compilation_config": {"level": 0}}
    assert (received.engine, received.openai_port, received.lora_slots) == (3, 9003, 2)
    for port in (None, 0):
        plain = RolloutConfig(model=path, dtype="float32", openai_port=port)
        assert EngineSpec(config=plain, engine=0, host="").openai_port == port
