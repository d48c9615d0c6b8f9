"""The ranks of some lanes, as threads over real gloo groups, and a landing that checks the order of its calls."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Self

import torch

from rollcast.comm import (
    Deadline,
    Group,
    Lane,
    PhaseTimer,
    VerifyError,
    WeightBroadcaster,
    WeightReceiver,
    WeightSource,
    host_store,
    join_group,
)

CPU = torch.device("cpu")
LONG_S = 60.0
Weights = dict[str, torch.Tensor]


class Memory:
    """A `Landing` over given tensors: live ones, and the initial values of each stage's.

    The call named by `refuse` ("commit", "finish 3") raises `RuntimeError`.
    """

    def __init__(self, live: Weights, stages: Mapping[int, Weights] | None = None, *, refuse: str = "") -> None:
        self.tensors = live
        self.stages = stages or {}
        self.refuse = refuse
        self.events: list[str] = []
        self.staged: dict[int, Weights] = {}
        self.processed: dict[int, Weights] = {}
        self._verifying = False

    def live(self, target: str) -> torch.Tensor:
        assert not self.events, "live tensors were requested after the receiver was made"
        return self.tensors[target]

    def staging(self, stage: int, target: str) -> torch.Tensor:
        assert self.events[0] == "begin"
        assert f"finish {stage}" not in self.events, "a move came after its stage was finished"
        tensors = self.staged.setdefault(stage, {})
        if target not in tensors:
            tensors[target] = self.stages[stage][target].clone()
        return tensors[target]

    def begin(self, *, verifying: bool = False) -> None:
        self.events = []
        self._note("begin")
        self._verifying = verifying

    def finish(self, stage: int) -> None:
        self._note(f"finish {stage}")
        values = {target: tensor.clone() for target, tensor in self.staged.pop(stage).items()}
        if self._verifying and not all(same_bytes(values[name], old) for name, old in self.processed[stage].items()):
            raise VerifyError(f"stage {stage} is not what the trainer holds")
        self.processed[stage] = values

    def commit(self) -> None:
        self._note("commit")
        assert sorted(self.events[1:-1]) == sorted(f"finish {stage}" for stage in self.stages)
        assert not self.staged

    def abort(self) -> None:
        self.staged.clear()
        self._note("abort")

    def _note(self, event: str) -> None:
        if event == self.refuse:
            raise RuntimeError(f"refused to {event}")
        self.events.append(event)

    def all_tensors(self) -> dict[tuple[int | None, str], torch.Tensor]:
        """Return the live tensors and those of every finished stage, by (stage, name)."""
        tensors: dict[tuple[int | None, str], torch.Tensor] = {(None, name): t for name, t in self.tensors.items()}
        for stage, values in self.processed.items():
            tensors.update(((stage, name), tensor) for name, tensor in values.items())
        return tensors


class Ranks:
    """The groups of some lanes: for each lane, those of its sender and of its workers."""

    def __init__(self, *lanes: Sequence[int]) -> None:
        self.start = ThreadPoolExecutor(2 * sum(len(workers) + 1 for workers in lanes)).submit
        store, address = host_store("127.0.0.1", timeout_s=LONG_S)
        joining: dict[tuple[Any, int], Future[Group]] = {}
        for lane, workers in enumerate(lanes):
            join = partial(join_group, "gloo", size=len(workers) + 1, deadline=Deadline(LONG_S), name=f"lane {lane}")
            joining["sender", lane] = self.start(join, store, rank=0)
            for rank, worker in enumerate(workers, start=1):
                joining[worker, lane] = self.start(join, address, rank=rank)
        groups = {key: future.result(LONG_S) for key, future in joining.items()}
        self.senders: dict[int, Group] = {lane: group for (side, lane), group in groups.items() if side == "sender"}
        self.lanes_of: dict[int, dict[int, Group]] = {}
        """Groups of each worker, by lane."""
        for (side, lane), group in groups.items():
            if side != "sender":
                self.lanes_of.setdefault(side, {})[lane] = group
        self.workers: dict[int, Group] = {w: next(iter(of_worker.values())) for w, of_worker in self.lanes_of.items()}
        """The only group of each worker, where it has one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for groups in (self.senders, *self.lanes_of.values()):
            for group in groups.values():
                group.close()

    def sync(
        self, broadcasters: Sequence[WeightBroadcaster], receivers: Mapping[int, WeightReceiver], **options: Any
    ) -> None:
        """Run one sync on all ranks. Raises the first failure."""
        sent = [self.start(send, broadcaster, self.senders, **options) for broadcaster in broadcasters]
        received = [self.start(receive, receiver, self.lanes_of[w], **options) for w, receiver in receivers.items()]
        all_results(*received, *sent)

    def verify(self, broadcasters: Sequence[WeightBroadcaster], receivers: Mapping[int, WeightReceiver]) -> None:
        """Send everything again and compare. Raises the first failure."""
        sent = [self.start(send, broadcaster, self.senders) for broadcaster in broadcasters]
        verified = [
            self.start(receiver.verify, self.lanes_of[w], deadline=Deadline(LONG_S), timer=PhaseTimer())
            for w, receiver in receivers.items()
        ]
        all_results(*verified, *sent)


def all_results(*futures: Future[Any]) -> list[Any]:
    """Return the threads' results, or raise the first error at once: the other threads may wait for the failed one."""
    done, _ = wait(futures, LONG_S, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
    return [future.result(0.0) for future in futures]


class WatchedSource(WeightSource):
    """A source that records the parameters that were gathered."""

    def gather(self, order: Sequence[int]) -> Iterator[tuple[int, Sequence[torch.Tensor]]]:
        self.gathered: list[int] = []
        for param, tensors in super().gather(order):
            self.gathered.append(param)
            yield param, tensors


class TappedWork:
    """A broadcast that flips a bit of one tensor as soon as that has arrived."""

    def __init__(self, work: Any, tensors: Sequence[torch.Tensor], damage: tuple[int, int] | None) -> None:
        self._work, self._tensors, self._damage = work, tensors, damage

    def wait(self, deadline: Deadline) -> None:
        self._work.wait(deadline)
        if self._damage:
            index, byte = self._damage
            self._tensors[index][byte] ^= 1


class Tapped:
    """A group that records its broadcasts, and flips a bit in byte `at[2]` of tensor `at[1]` of broadcast `at[0]`."""

    def __init__(self, group: "Group | Tapped", at: tuple[int, int, int] | None = None) -> None:
        self.group, self.at = group, at
        self.rank, self.size, self.low_priority = group.rank, group.size, group.low_priority
        self.broadcasts, self.nbytes = 0, 0
        self.extents: list[tuple[int, int]] = []
        """(address, bytes) of every tensor."""

    def broadcast(self, tensors: Sequence[torch.Tensor], *, root: int, deadline: Deadline) -> TappedWork:
        damage = self.at[1:] if self.at and self.at[0] == self.broadcasts else None
        self.broadcasts += 1
        self.extents += [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
        self.nbytes += sum(tensor.nbytes for tensor in tensors)
        return TappedWork(self.group.broadcast(tensors, root=root, deadline=deadline), tensors, damage)

    def ready(self) -> bool:
        return True

    def unmap(self) -> None: ...

    def close(self) -> None:
        self.group.close()


def send(
    broadcaster: WeightBroadcaster, groups: Mapping[int, Group], timeout_s: float = LONG_S, **options: Any
) -> PhaseTimer:
    timer = PhaseTimer()
    broadcaster.source.peek_manifest()
    broadcaster.send(groups, deadline=Deadline(timeout_s), timer=timer, **options)
    return timer


def receive(receiver: WeightReceiver, groups: Any, timeout_s: float = LONG_S, **options: Any) -> PhaseTimer:
    """`groups` maps lanes to groups, or is the group of the only lane."""
    timer = PhaseTimer()
    groups = groups if isinstance(groups, dict) else dict.fromkeys(receiver.lanes, groups)
    receiver.receive(groups, deadline=Deadline(timeout_s), timer=timer, **options)
    return timer


def receiver_of(lanes: Sequence[Lane], memory: Memory) -> WeightReceiver:
    return WeightReceiver(lanes, memory, device=CPU)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor's bytes in order, whatever its strides."""
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(raw(one), raw(other))
