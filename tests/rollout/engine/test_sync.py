"""An engine's way from one version to the next, with the requests meanwhile: fake vLLM, fake workers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rollcast.comm.report import WorkerReport
from rollcast.rollout import EngineError
from rollcast.rollout.config import SyncOptions
from rollcast.rollout.engine.async_llm import LLMControl
from rollcast.rollout.engine.requests import Requests
from rollcast.rollout.engine.sync import EngineSync
from rollcast.rollout.errors import Failure
from rollcast.rollout.protocol.messages import Receive, ReceiveResult

SOON_S = 5.0


class FakeLLM:
    """Answers each request with one output; notes salts, and what is done to the scheduler."""

    def __init__(self) -> None:
        self.engine_core = self
        self.events: list[str] = []
        self.salts: list[str] = []

    async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[str]:
        self.salts.append(prompt["cache_salt"])
        yield "output"

    async def abort(self, request_ids: list[str]) -> None:
        self.events.append("abort")

    async def pause_scheduler_async(self, *, mode: str, clear_cache: bool) -> None:
        self.events.append(f"pause {mode}")

    async def resume_scheduler_async(self) -> None:
        self.events.append("resume")

    async def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool:
        self.events.append("clear")
        return True


class FakeWorkers:
    """Two workers; the methods in `failing` raise in the second one."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing: set[str] = set()

    async def call(self, method: str, *arguments: Any, phase: str) -> list[Any]:
        self.calls.append(method)
        return [None, None]

    async def call_directly(
        self, method: str, *, phase: str, timeout_s: float, **arguments: Any
    ) -> list[ReceiveResult]:
        self.calls.append(method)
        if method in self.failing:
            raise EngineError(failures=[Failure(text="it stumbled", engine=1, worker=1, phase=phase)])
        return [ReceiveResult(phases_s={"wire": 1.0})] * 2


class Parts:
    """One engine of index 1, by its parts."""

    def __init__(self) -> None:
        self.llm, self.workers = FakeLLM(), FakeWorkers()
        self.requests = Requests(self.llm, index=1, eos_token_ids=(), slots=0)
        workers: Any = self.workers
        control = LLMControl(self.llm)
        self.sync = EngineSync(workers, self.requests, control, index=1, wake_for_sync=False)

    async def receive(self, version: int, *, alone: bool = False, **options: Any) -> None:
        request = Receive(
            version=version,
            digests=["a", "b"],
            first_rank=3,
            options=replace(SyncOptions("in_place", "keep", "kept", "none"), **options),
            alone=alone,
            timeout_s=SOON_S,
        )
        # A task of its own, as in the engine process: `abort` cancels a sync that is still under way.
        reports = await asyncio.create_task(self.sync.receive(request))
        assert reports == [WorkerReport(3, {"wire": 1.0}), WorkerReport(4, {"wire": 1.0})]

    async def commit(self, version: int) -> None:
        await asyncio.create_task(self.sync.commit(version, timeout_s=SOON_S))

    async def generate(self) -> list[Any]:
        outputs = self.requests.outputs({"type": "token"}, None, numbers=set())
        return [output async for output, _, _ in outputs]

    @property
    def refusal(self) -> str:
        return str(self.requests.refusal or "")


def run(case: Callable[[Parts], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(case(Parts()), SOON_S)

    asyncio.run(limited())


@pytest.mark.parametrize("mode", ["in_place", "shadow"])
def test_outputs_are_held_from_the_change_until_finalize(mode: str) -> None:
    async def case(engine: Parts) -> None:
        await engine.receive(1, mode=mode)
        if mode == "shadow":
            assert await engine.generate() == ["output"]
        await engine.commit(1)
        held = asyncio.create_task(engine.generate())
        await asyncio.sleep(0.01)
        assert not held.done() and engine.requests.version == 1
        engine.sync.finalize()
        assert await held == ["output"]
        assert not engine.sync.busy

    run(case)


def test_an_engine_alone_commits_and_releases_by_itself() -> None:
    async def case(engine: Parts) -> None:
        await engine.receive(1, alone=True)
        assert engine.requests.version == 1
        assert await engine.generate() == ["output"]

    run(case)


@pytest.mark.parametrize("mode", ["in_place", "shadow"])
@pytest.mark.parametrize("kv_cache", ["kept", "recomputed"])
def test_every_sync_changes_the_salt_and_only_recomputed_clears_the_cache(mode: str, kv_cache: str) -> None:
    async def case(engine: Parts) -> None:
        await engine.generate()
        await engine.receive(1, mode=mode, kv_cache=kv_cache, alone=True)
        await engine.generate()
        before, after = engine.llm.salts
        assert before != after
        assert ("clear" in engine.llm.events) is (kv_cache == "recomputed")
        assert engine.llm.events == (["pause keep", "clear", "resume"] if kv_cache == "recomputed" else [])

    run(case)


@pytest.mark.parametrize(
    ("mode", "failing", "phase"), [("in_place", "receive", "receive"), ("shadow", "apply", "commit")]
)
def test_partially_updated_weights_are_refused_until_the_next_sync(mode: str, failing: str, phase: str) -> None:
    async def case(engine: Parts) -> None:
        engine.workers.failing.add(failing)
        with pytest.raises(EngineError) as caught:
            await engine.receive(1, mode=mode, alone=True)
        assert caught.value.failures == (Failure(text="it stumbled", engine=1, worker=1, phase=phase),)
        await engine.sync.abort("it stumbled")
        text = "has partially updated weights and refuses to generate until the next sync: it stumbled"
        assert engine.refusal == f"engine 1 {text}"
        assert engine.requests.refusal and engine.requests.refusal.failures == (Failure(text=text, engine=1),)
        assert "rollcast_leave" in engine.workers.calls and "pause keep" in engine.llm.events
        engine.workers.failing.clear()
        # There is nothing to decode for: even a shadow sync receives in place.
        await engine.receive(1, mode=mode, alone=True)
        assert engine.workers.calls[-1] == "receive"
        assert not engine.refusal and await engine.generate() == ["output"]

    run(case)


def test_weights_of_an_aborted_sync_are_refused_and_their_version_may_come_again() -> None:
    async def case(engine: Parts) -> None:
        await engine.receive(1)
        await engine.commit(1)
        await engine.sync.abort("engine 0 stumbled")
        assert engine.refusal == (
            "engine 1 has weights of an aborted sync and refuses to generate until the next sync: engine 0 stumbled"
        )
        with pytest.raises(EngineError, match="engine 1 has version 1: 0 is not newer"):
            await engine.receive(0)
        await engine.receive(1)
        await engine.commit(1)
        engine.sync.finalize()
        assert not engine.refusal and await engine.generate() == ["output"]

    run(case)


def test_a_staged_sync_that_is_aborted_leaves_the_engine_serving() -> None:
    async def case(engine: Parts) -> None:
        await engine.receive(1, mode="shadow")
        await engine.sync.abort("engine 0 stumbled")
        assert engine.requests.version == 0 and not engine.refusal
        assert await engine.generate() == ["output"]

    run(case)


def test_refuse_ends_requests_in_flight_with_its_reason() -> None:
    async def case(engine: Parts) -> None:
        sampling: Any = SimpleNamespace(n=2)
        request: Any = SimpleNamespace(request_id="a", sampling=sampling, prompt=[1], aborted=False, emit=None)
        engine.requests.hold()
        running = asyncio.create_task(engine.requests.generate(request))
        await asyncio.sleep(0.01)
        assert engine.requests.count == 1
        engine.sync.discard_weights("dropped its weights")
        with pytest.raises(EngineError, match=r"^engine 1 dropped its weights$"):
            await running
        assert engine.requests.count == 0

    run(case)
