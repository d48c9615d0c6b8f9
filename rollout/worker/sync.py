"""One worker's side of a sync (vLLM worker process: every tensor-parallel rank of every engine)."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from rollcast.comm import Deadline, Group, Lane, Manifest, PhaseTimer, WeightReceiver, fill_buckets, join_group
from rollcast.comm.deadline import poll_sleep
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.apply import LiveLanding
from rollcast.rollout.landing.lora import AdapterLanding
from rollcast.rollout.protocol.messages import JoinGroup, ReceiveResult
from rollcast.rollout.protocol.worker_channel import WorkerEndpoint
from rollcast.rollout.worker.fingerprint import fingerprint_64bit, raise_if_changed
from rollcast.rollout.worker.model import WorkerModel
from rollcast.rollout.worker.shadow import Shadow, spare_bytes
from rollcast.rollout.worker.step_gate import StepGate

MOVED = "{} was moved while weights were on their way: sync again"


class WorkerSync:
    """Takes one vLLM worker from one version of the weights to the next.

    vLLM's thread calls `connect`, `prepare`, `join`, `leave` and `release`, through `RollcastWorker`. The endpoint's
    thread calls `receive`, `receive_shadow` and `apply`, whatever vLLM is doing: they change weights between two steps.
    """

    def __init__(self, worker: Any) -> None:
        """Nothing of vLLM's `worker` is read before a method needs it."""
        self.model = WorkerModel(worker)
        self.gate: StepGate | None = None
        self.group: Group | None = None
        self.receiver: WeightReceiver | None = None
        self.shadow: Shadow | None = None
        self.landing: LiveLanding | AdapterLanding
        """Set by `prepare`, and again when vLLM has moved tensors."""
        self._worker = worker
        self._endpoint: WorkerEndpoint
        # The gate's count when the live tensors were last seen in their places.
        self._other_calls_seen = -1

    @property
    def rank(self) -> int:
        """This worker's rank in its engine."""
        return self._worker.rank

    @property
    def device(self) -> torch.device:
        """This worker's device."""
        return self._worker.device

    def connect(self, address: str, *, workers: int, lora_versions: int) -> None:
        """Count tokens and answer the engine process at `address` from now on. Called once, before any request.

        `lora_versions` LoRA slots hold adapters of zeros from then on: 0 for engines without LoRA.
        """
        if lora_versions:
            self.model.register_adapters(lora_versions)
        self.gate = StepGate(self._worker)
        self._endpoint = WorkerEndpoint(address, rank=self.rank, workers=workers, run=self._run)

    def passing_gate(self) -> AbstractContextManager[None]:
        """Let in a call of vLLM's that is not a step. On vLLM's thread."""
        return nullcontext() if self.gate is None else self.gate.passing()

    def prepare(self, manifest: bytes) -> str:
        """Compile the landing plan; return its digest. Collective over the engine's workers.

        Raises `LandingError` if the model cannot take the manifest, naming the parameters.
        """
        self.model.raise_if_unsupported()
        plan = self.model.plan(Manifest.from_bytes(manifest))
        self.landing = self.model.land(plan)
        return plan.digest

    def join(self, request: JoinGroup) -> None:
        """Join the group of this worker's lane. Collective over the lane.

        Raises `ValueError` if the lane's buckets differ from the sender's.
        """
        deadline = Deadline(request.timeout_s)
        self.leave()
        assignment = request.assignments[self.rank]
        buckets = fill_buckets(self.landing.plan.moves, request.gather_order, bucket_bytes=request.bucket_bytes)
        lane = Lane(assignment.lane, assignment.sender, (), buckets)
        if lane.digest != assignment.digest:
            raise ValueError("the worker's transfer plan differs from the trainer's: run one version of rollcast")
        self._bind(lane)
        self.group = join_group(
            assignment.transport,
            request.address,
            rank=assignment.rank,
            size=assignment.size,
            deadline=deadline,
            device=self.device,
            name=f"lane-{assignment.lane}",
            label=assignment.label,
        )

    def receive(
        self, *, version: int, digests: list[str], slot: int, verify: str, unchanged: bool, deadline: Deadline
    ) -> ReceiveResult:
        """Receive one sync into the live parameters. Collective over the lane.

        `digests` are those of the lanes of the engine's workers; `slot` is the LoRA slot to fill; with `unchanged`
        no tensor may change.

        On any failure the worker leaves the group, which makes the sender fail at once, and the parameters stay
        partially updated until a later sync succeeds.
        """
        timer = PhaseTimer()
        with self._leave_on_failure(), self._after_steps(deadline, timer) as (gate, stream):
            group, receiver = self._joined(gate, version=version, digests=digests, slot=slot)
            group.low_priority = False
            before = fingerprint_64bit(self.model.module) if unchanged else {}
            receiver.receive(
                group, deadline=deadline, timer=timer, checksums=verify != "none", meanwhile=self._raise_if_moved
            )
            if verify == "full":
                receiver.verify(group, deadline=deadline, timer=timer)
            if unchanged:
                raise_if_changed(before, fingerprint_64bit(self.model.module))
            if stream is not None:
                # Before the next step begins: nothing else orders it after this stream.
                stream.synchronize()
            return ReceiveResult(phases_s=timer.phases_s | {"total": timer.total_s()}, tokens=gate.tokens.take())

    def receive_shadow(
        self, *, version: int, digests: list[str], slot: int, verify: str, deadline: Deadline
    ) -> ReceiveResult:
        """Receive one sync into spare memory while the engine decodes. Collective over the lane.

        Arguments as for `receive`; the result has no tokens. Raises `LandingError` if there is not enough spare memory.
        """
        with self._leave_on_failure():
            with self._between_steps(deadline) as gate:
                group, receiver = self._joined(gate, version=version, digests=digests, slot=slot)
                group.low_priority = True
                if self.shadow is None:
                    with gate.side_stream() as stream:
                        gate.order_after_steps(stream)
                        self.shadow = Shadow(self.landing, receiver.lane, device=self.device)
            with gate.side_stream(), torch.no_grad():
                phases_s = self.shadow.receive(group, verify=verify, deadline=deadline)
                self._raise_if_moved()
                return ReceiveResult(phases_s=phases_s)

    def apply(self, *, deadline: Deadline) -> ReceiveResult:
        """Switch to the weights in spare memory: this worker's later GPU work uses them.

        Collective over the engine's workers. The result has tokens alone.
        """
        with self._between_steps(deadline) as gate:
            if self.shadow is None:
                raise RuntimeError("no version has been received into spare memory: sync again")
            if gate.other_calls != self._other_calls_seen and (moved := self._moved_tensor()) is not None:
                raise LandingError(MOVED.format(moved))
            with gate.worker_stream():
                self.shadow.apply()
            return ReceiveResult(tokens=gate.tokens.take())

    def release(self) -> None:
        """Free what a sync keeps: spare memory, and mappings of the trainer's memory. Idempotent."""
        self.shadow = None
        if self.receiver is not None:
            self.receiver.release()
        if self.group is not None:
            self.group.unmap()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def leave(self) -> None:
        """Leave the lane's group. Idempotent."""
        if self.group is not None:
            self.group.close()
            self.group = None

    def _run(self, method: str, arguments: dict[str, Any], deadline: Deadline) -> Any:
        """Call a method for the engine process, on the endpoint's thread."""
        return getattr(self, method)(**arguments, deadline=deadline)

    @contextmanager
    def _between_steps(self, deadline: Deadline, prepare: Callable[[], None] | None = None) -> Iterator[StepGate]:
        """Close the gate, on the endpoint's thread: vLLM begins no step inside the context."""
        assert self.gate is not None
        closed = self.gate.closed(partial(self._endpoint.agree, deadline=deadline), prepare, deadline=deadline)
        with closed, torch.no_grad(), self.model.vllm_config():
            yield self.gate

    @contextmanager
    def _after_steps(
        self, deadline: Deadline, timer: PhaseTimer
    ) -> Iterator[tuple[StepGate, torch.cuda.Stream | None]]:
        """Close the gate, and make GPU work inside the context wait for the steps that are queued.

        Yields the gate and the stream of that work. While the steps run, the first buckets travel already.
        """
        gate, group, receiver = self.gate, self.group, self.receiver
        assert gate is not None
        # The workers of one engine would wait for each other, and the sender for one of them.
        may_prefetch = self._endpoint.workers == 1

        def start_prefetch() -> None:
            if group and receiver and may_prefetch and gate.gpu_busy and receiver.prepare_prefetch(spare_bytes):
                # The steps need the GPU.
                group.low_priority = True
                receiver.start_prefetch(group, deadline=deadline)

        with gate.side_stream() as stream:
            if group and receiver and may_prefetch:
                # The trainer may still gather or pack: the engine decodes on meanwhile.
                _wait_until_ready(group, gate, deadline)
                if gate.gpu_busy:
                    receiver.prepare_prefetch(spare_bytes)
            waited_s = timer.total_s()
            with self._between_steps(deadline, start_prefetch):
                timer.phases_s["gate"] = timer.total_s() - waited_s
                gate.order_after_steps(stream)
                yield gate, stream

    @contextmanager
    def _leave_on_failure(self) -> Iterator[None]:
        """Leave the group if the context fails: the one of its start, for a later sync may have joined another."""
        group = self.group
        try:
            yield
        except BaseException:
            if group is not None:
                group.close()
            if self.group is group:
                self.group = None
            raise

    def _joined(self, gate: StepGate, *, version: int, digests: list[str], slot: int) -> tuple[Group, WeightReceiver]:
        """Return the group and the receiver, if this worker can receive the sync that was announced."""
        if self.group is None or self.receiver is None:
            raise RuntimeError("this worker has not joined its lane's group, or has left it after a failure")
        self._follow_moved_tensors(gate, self.receiver)
        if self.receiver.lane.digest != digests[self.rank]:
            raise ValueError(f"version {version} was announced with another transfer plan than the one joined with")
        if isinstance(self.landing, AdapterLanding):
            self.landing.slot = slot
        return self.group, self.receiver

    def _follow_moved_tensors(self, gate: StepGate, receiver: WeightReceiver) -> None:
        """Bind to the live tensors again if a call of vLLM's has moved any since the last sync."""
        if gate.other_calls == self._other_calls_seen:
            return
        moved, self._other_calls_seen = self._moved_tensor(), gate.other_calls
        if moved is None:
            return
        if receiver.prefetch_count:
            raise LandingError(MOVED.format(moved))
        plan = self.model.compile(self.landing.plan.manifest)
        if plan.digest != self.landing.plan.digest:
            raise LandingError(f"{moved} was replaced and the weights now land elsewhere: sync again to plan anew")
        self.landing = self.model.land(plan)
        self._bind(receiver.lane)

    def _moved_tensor(self) -> str | None:
        """Return the name of a live tensor that is not where it was, if any."""
        return self.landing.moved(self.model.module)

    def _raise_if_moved(self) -> None:
        """Raise `LandingError` if a live tensor was moved by a call that rollcast does not know."""
        if (moved := self._moved_tensor()) is not None:
            raise LandingError(MOVED.format(moved))

    def _bind(self, lane: Lane) -> None:
        self.receiver = WeightReceiver(lane, self.landing, device=self.device)
        self.shadow = None


def _wait_until_ready(group: Group, gate: StepGate, deadline: Deadline) -> None:
    """Wait until the first broadcast can start."""
    start = time.perf_counter()
    while not group.ready():
        deadline.left("the trainer's first bucket")
        poll_sleep(start, low_priority=gate.gpu_busy)
