"""The ranks of some lanes: threads over real gloo groups, and a landing that holds the receiver to its promises."""

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
    """A `Landing` over given tensors: live ones, and the initial values of those of each stage."""

    def __init__(self, live: Weights, stages: Mapping[int, Weights] | None = None, *, refuse: str = "") -> None:
        self.tensors = live
        self.stages = stages or {}
        self.refuse = refuse
        self.events: list[str] = []
        self.staged: dict[int, Weights] = {}
        self.processed: dict[int, Weights] = {}
        self._confirming = False

    def live(self, target: str) -> torch.Tensor:
        assert not self.events, "live tensors are asked for when the receiver is made"
        return self.tensors[target]

    def staging(self, stage: int, target: str) -> torch.Tensor:
        assert self.events[0] == "begin"
        assert f"finish {stage}" not in self.events, "a move came after its stage was finished"
        tensors = self.staged.setdefault(stage, {})
        if target not in tensors:
            tensors[target] = self.stages[stage][target].clone()
        return tensors[target]

    def begin(self, *, confirming: bool = False) -> None:
        self.events = []
        self._note("begin")
        self._confirming = confirming

    def finish(self, stage: int) -> None:
        self._note(f"finish {stage}")
        made = {target: tensor.clone() for target, tensor in self.staged.pop(stage).items()}
        if self._confirming and not all(same_bytes(made[name], old) for name, old in self.processed[stage].items()):
            raise VerifyError(f"stage {stage} is not what it was")
        self.processed[stage] = made

    def commit(self) -> None:
        self._note("commit")
        assert sorted(self.events[1:-1]) == sorted(f"finish {stage}" for stage in self.stages)
        assert not self.staged

    def abandon(self) -> None:
        self.staged.clear()
        self._note("abandon")

    def _note(self, event: str) -> None:
        if event == self.refuse:
            raise RuntimeError(f"refused to {event}")
        self.events.append(event)

    def all_tensors(self) -> dict[tuple[int | None, str], torch.Tensor]:
        """Live tensors and those of every finished stage."""
        tensors: dict[tuple[int | None, str], torch.Tensor] = {(None, name): t for name, t in self.tensors.items()}
        for stage, made in self.processed.items():
            tensors.update(((stage, name), tensor) for name, tensor in made.items())
        return tensors


class Ranks:
    """The groups of some lanes: of each lane its sender and its workers."""

    def __init__(self, *lanes: Sequence[int]) -> None:
        self.start = ThreadPoolExecutor(2 * sum(len(workers) + 1 for workers in lanes)).submit
        store, address = host_store("127.0.0.1", timeout_s=LONG_S)
        joining = {}
        for lane, workers in enumerate(lanes):
            join = partial(join_group, "gloo", size=len(workers) + 1, deadline=Deadline(LONG_S), name=f"lane {lane}")
            joining["sender", lane] = self.start(join, store, rank=0)
            for rank, worker in enumerate(workers, start=1):
                joining["worker", worker] = self.start(join, address, rank=rank)
        groups = {key: future.result(LONG_S) for key, future in joining.items()}
        self.senders: dict[int, Group] = {index: group for (side, index), group in groups.items() if side == "sender"}
        self.workers: dict[int, Group] = {index: group for (side, index), group in groups.items() if side == "worker"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for group in (*self.senders.values(), *self.workers.values()):
            group.close()

    def sync(
        self, broadcasters: Sequence[WeightBroadcaster], receivers: Mapping[int, WeightReceiver], **options: Any
    ) -> None:
        """One sync of everybody. Raises the first failure."""
        sent = [self.start(send, broadcaster, self.senders, **options) for broadcaster in broadcasters]
        received = [self.start(receive, receiver, self.workers[w], **options) for w, receiver in receivers.items()]
        all_results(*received, *sent)

    def confirm(self, broadcasters: Sequence[WeightBroadcaster], receivers: Mapping[int, WeightReceiver]) -> None:
        """Everything is sent again and compared. Raises the first failure."""
        sent = [self.start(send, broadcaster, self.senders) for broadcaster in broadcasters]
        confirmed = [
            self.start(receiver.confirm, self.workers[w], deadline=Deadline(LONG_S), timer=PhaseTimer())
            for w, receiver in receivers.items()
        ]
        all_results(*confirmed, *sent)


def all_results(*futures: Future[Any]) -> list[Any]:
    """What the threads return, or the error of the first that fails: the others may wait for it until they give up."""
    done, _ = wait(futures, LONG_S, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
    return [future.result(0.0) for future in futures]


class WatchedSource(WeightSource):
    """Notes the parameters that were taken from it."""

    def walk(self, order: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        self.taken: list[int] = []
        for param, tensor in super().walk(order):
            self.taken.append(param)
            yield param, tensor


class TappedWork:
    """Damages a tensor as soon as it has arrived."""

    def __init__(self, work: Any, tensors: Sequence[torch.Tensor], damage: tuple[int, int] | None) -> None:
        self._work, self._tensors, self._damage = work, tensors, damage

    def wait(self, deadline: Deadline) -> None:
        self._work.wait(deadline)
        if self._damage:
            index, byte = self._damage
            self._tensors[index][byte] ^= 1


class Tapped:
    """Notes what a group carries, and flips a bit in byte `at[2]` of tensor `at[1]` of broadcast `at[0]`."""

    def __init__(self, group: "Group | Tapped", at: tuple[int, int, int] | None = None) -> None:
        self.group, self.at = group, at
        self.rank, self.size, self.gentle = group.rank, group.size, group.gentle
        self.broadcasts, self.nbytes = 0, 0
        self.stretches: list[tuple[int, int]] = []

    def broadcast(self, tensors: Sequence[torch.Tensor], *, root: int, deadline: Deadline) -> TappedWork:
        damage = self.at[1:] if self.at and self.at[0] == self.broadcasts else None
        self.broadcasts += 1
        self.stretches += [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
        self.nbytes += sum(tensor.nbytes for tensor in tensors)
        return TappedWork(self.group.broadcast(tensors, root=root, deadline=deadline), tensors, damage)

    def ready(self) -> bool:
        return True

    def release(self) -> None: ...

    def close(self) -> None:
        self.group.close()


def send(
    broadcaster: WeightBroadcaster, groups: Mapping[int, Group], timeout_s: float = LONG_S, **options: Any
) -> PhaseTimer:
    timer = PhaseTimer()
    broadcaster.send(groups, deadline=Deadline(timeout_s), timer=timer, **options)
    return timer


def receive(receiver: WeightReceiver, group: Group, timeout_s: float = LONG_S, **options: Any) -> PhaseTimer:
    timer = PhaseTimer()
    receiver.receive(group, deadline=Deadline(timeout_s), timer=timer, **options)
    return timer


def receiver_of(lane: Lane, memory: Memory) -> WeightReceiver:
    return WeightReceiver(lane, memory, device=CPU)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor's bytes in order, whatever its strides."""
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(raw(one), raw(other))
