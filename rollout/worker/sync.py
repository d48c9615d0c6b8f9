"""One worker's side of a sync (vLLM worker process: every tensor-parallel rank of every engine)."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from rollcast.comm import Deadline, Group, Kept, Lane, LaneGroups, Manifest, PhaseTimer, WeightReceiver, join_group
from rollcast.comm.deadline import poll_sleep
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.apply import LiveLanding
from rollcast.rollout.landing.lora import AdapterLanding
from rollcast.rollout.protocol.messages import Assignment, JoinGroup, ReceiveResult
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
        self.groups: LaneGroups | None = None
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

    def prepare(self, manifest: bytes, kept: bytes) -> str:
        """Compile the landing plan; return its digest. Collective over the engine's workers.

        Raises `LandingError` if the model cannot take the manifest, naming the parameters.
        """
        self.model.raise_if_unsupported()
        plan = self.model.plan(Manifest.from_bytes(manifest), Kept.from_bytes(kept))
        self.landing = self.model.land(plan)
        return plan.digest

    def join(self, request: JoinGroup) -> None:
        """Join the groups of this worker's lanes. Collective over each lane.

        Raises `ValueError` if a lane's buckets differ from the sender's.
        """
        deadline = Deadline(request.timeout_s)
        self.leave()
        assignments = request.assignments[self.rank]
        self._bind([self._lane(assignment, request.order) for assignment in assignments])
        self.groups = groups = LaneGroups()
        # All ranks join their lanes in the order of the lanes: none waits for one that waits for it.
        with self._leave_on_failure():
            for each in assignments:
                groups[each.lane] = join_group(
                    each.transport,
                    request.address,
                    rank=each.rank,
                    size=each.size,
                    deadline=deadline,
                    device=self.device,
                    name=f"lane-{each.lane}",
                    label=each.label,
                )

    def receive(
        self, *, version: int, digests: list[str], slot: int, verify: str, unchanged: bool, deadline: Deadline
    ) -> ReceiveResult:
        """Receive one sync into the live parameters. Collective over the lanes.

        `digests` are those of the lanes of the engine's workers; `slot` is the LoRA slot to fill; with `unchanged`
        no tensor may change.

        On any failure the worker leaves the groups, which makes the senders fail at once, and the parameters stay
        partially updated until a later sync succeeds.
        """
        timer = PhaseTimer()
        with self._leave_on_failure(), self._after_steps(deadline, timer) as (gate, stream):
            groups, receiver = self._joined(gate, version=version, digests=digests, slot=slot)
            groups.set_low_priority(False)
            before = fingerprint_64bit(self.model.module) if unchanged else {}
            receiver.receive(
                groups, deadline=deadline, timer=timer, checksums=verify != "none", meanwhile=self._raise_if_moved
            )
            if verify == "full":
                receiver.verify(groups, deadline=deadline, timer=timer)
            if unchanged:
                raise_if_changed(before, fingerprint_64bit(self.model.module))
            if stream is not None:
                # Before the next step begins: nothing else orders it after this stream.
                stream.synchronize()
            return ReceiveResult(phases_s=timer.phases_s | {"total": timer.total_s()}, tokens=gate.tokens.take())

    def receive_shadow(
        self, *, version: int, digests: list[str], slot: int, verify: str, deadline: Deadline
    ) -> ReceiveResult:
        """Receive one sync into spare memory while the engine decodes. Collective over the lanes.

        Arguments as for `receive`; the result has no tokens. Raises `LandingError` if there is not enough spare memory.
        """
        with self._leave_on_failure():
            with self._between_steps(deadline) as gate:
                groups, receiver = self._joined(gate, version=version, digests=digests, slot=slot)
                groups.set_low_priority(True)
                if self.shadow is None:
                    with gate.side_stream() as stream:
                        gate.order_after_steps(stream)
                        self.shadow = Shadow(self.landing, receiver.planned, device=self.device)
            with gate.side_stream(), torch.no_grad():
                phases_s = self.shadow.receive(groups, verify=verify, deadline=deadline)
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
        if self.groups is not None:
            self.groups.unmap()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def leave(self) -> None:
        """Leave the lanes' groups. Idempotent."""
        if self.groups is not None:
            self.groups.close()
            self.groups = None

    def _lane(self, assignment: Assignment, order: Sequence[int]) -> Lane:
        lane = Lane.build(
            self.landing.plan.moves,
            order,
            index=assignment.lane,
            sender=assignment.sender,
            boxes=assignment.boxes,
            bucket_bytes=assignment.bucket_bytes,
        )
        if lane.digest != assignment.digest:
            raise ValueError("the worker's transfer plan differs from the trainer's: run one version of rollcast")
        return lane

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
        gate, groups, receiver = self.gate, self.groups, self.receiver
        assert gate is not None
        # The workers of one engine would wait for each other, and a sender for one of them.
        may_prefetch = self._endpoint.workers == 1

        def start_prefetch() -> None:
            if groups and receiver and may_prefetch and gate.gpu_busy and receiver.prepare_prefetch(spare_bytes):
                # The steps need the GPU.
                groups.set_low_priority(True)
                receiver.start_prefetch(groups, deadline=deadline)

        with gate.side_stream() as stream:
            if groups and receiver and may_prefetch and receiver.first_lane is not None:
                # The trainers may still pack: the engine decodes on meanwhile.
                _wait_until_ready(groups[receiver.first_lane], gate, deadline)
                if gate.gpu_busy:
                    receiver.prepare_prefetch(spare_bytes)
            waited_s = timer.total_s()
            with self._between_steps(deadline, start_prefetch):
                timer.phases_s["gate"] = timer.total_s() - waited_s
                gate.order_after_steps(stream)
                yield gate, stream

    @contextmanager
    def _leave_on_failure(self) -> Iterator[None]:
        """Leave the groups if the context fails: those of its start, for a later sync may have joined others."""
        groups = self.groups
        try:
            yield
        except BaseException:
            if groups is not None:
                groups.close()
            if self.groups is groups:
                self.groups = None
            raise

    def _joined(
        self, gate: StepGate, *, version: int, digests: list[str], slot: int
    ) -> tuple[LaneGroups, WeightReceiver]:
        """Return the groups and the receiver, if this worker can receive the sync that was announced."""
        if self.groups is None or self.receiver is None:
            raise RuntimeError("this worker has not joined its lanes' groups, or has left them after a failure")
        self._follow_moved_tensors(gate, self.receiver)
        if self.receiver.digest != digests[self.rank]:
            raise ValueError(f"version {version} was announced with another transfer plan than the one joined with")
        if isinstance(self.landing, AdapterLanding):
            self.landing.slot = slot
        return self.groups, self.receiver

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
        self._bind(receiver.planned)

    def _moved_tensor(self) -> str | None:
        """Return the name of a live tensor that is not where it was, if any."""
        return self.landing.moved(self.model.module)

    def _raise_if_moved(self) -> None:
        """Raise `LandingError` if a live tensor was moved by a call that rollcast does not know."""
        if (moved := self._moved_tensor()) is not None:
            raise LandingError(MOVED.format(moved))

    def _bind(self, lanes: Sequence[Lane]) -> None:
        self.receiver = WeightReceiver(lanes, self.landing, device=self.device)
        self.shadow = None


def _wait_until_ready(group: Group, gate: StepGate, deadline: Deadline) -> None:
    """Wait until the first broadcast can start."""
    start = time.perf_counter()
    while not group.ready():
        deadline.left("the trainers' first bucket")
        poll_sleep(start, low_priority=gate.gpu_busy)
