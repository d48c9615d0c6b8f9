"""Changing weights between two steps of a running worker, without asking vLLM's scheduler (worker)."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rollcast.comm import Deadline

# Calls of vLLM's that read weights, or move them. A step is `execute_model`, and `sample_tokens` if that has returned
# nothing.
STEP, SAMPLE, OTHERS = "execute_model", "sample_tokens", ("sleep", "wake_up")
WHAT = "vLLM's step under way"


class Gate:
    """What vLLM makes a worker do passes one by one; other threads close the gate to change weights in between.

        with gate.closed(agree, prepare, deadline=deadline):
            ...                                     # no call is under way, and none begins

    The workers of an engine are called in the same order, and must stop at the same place: a step that half of them
    have begun waits for the other half. So each tells how many calls it has let in, and all go on to the most.
    On a GPU, the work of calls that are over may still be queued: `beside` and `in_line` say what goes on meanwhile.
    """

    def __init__(self, worker: Any) -> None:
        self.steps = StepWatch()
        device = torch.device(worker.device)
        on_gpu = device.type == "cuda"
        self._device = device
        # Of vLLM's thread, which makes the gate.
        self._stream = torch.cuda.current_stream(device) if on_gpu else None
        self._side = torch.cuda.Stream(device) if on_gpu else None
        self._turn = threading.Condition()
        self._passed = 0
        self.others = 0
        """Calls so far that were no steps. Of all that vLLM does, only these are known to move weights."""
        self._limit: int | None = None
        self._inside = False
        self._guard(worker)

    @contextmanager
    def closed(
        self, agree: Callable[[int], int], prepare: Callable[[], None] | None = None, *, deadline: Deadline
    ) -> Iterator[None]:
        """Close the gate for a while. `agree` gets how many calls have passed, and returns how many shall.

        `prepare` makes use of the time in which the last of them may still be under way. Collective over the engine's
        workers. Raises `TimeoutError`, and then nothing was done.
        """
        with self._turn:
            self._limit = self._passed
        try:
            limit = agree(self._limit)
            if prepare is not None:
                prepare()
            self._settle(limit, deadline)
            yield
        finally:
            with self._turn:
                self._limit = None
                self._turn.notify_all()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """A call of vLLM's that is no step, on its thread."""
        self._enter()
        self.others += 1
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def beside(self) -> Iterator[torch.cuda.Stream | None]:
        """The caller's GPU work goes on a stream of its own, which this returns, beside the worker's."""
        if self._side is None:
            yield None
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._side):
            yield self._side

    @contextmanager
    def in_line(self) -> Iterator[None]:
        """The caller's GPU work goes into the worker's own stream, between the steps that are queued and the next."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    @property
    def busy(self) -> bool:
        """Whether the GPU still has steps to do."""
        return self._stream is not None and not self._stream.query()

    def follow(self, stream: torch.cuda.Stream | None) -> None:
        """What comes next on `stream` waits for the steps that are queued."""
        if stream is not None and self._stream is not None:
            stream.wait_stream(self._stream)

    def _settle(self, limit: int, deadline: Deadline) -> None:
        with self._turn:
            self._limit = limit
            self._turn.notify_all()
            while self._passed < limit or self._inside:
                self._turn.wait(deadline.left(WHAT).total_seconds())

    def _enter(self) -> None:
        with self._turn:
            # A step that was never sampled is over.
            self._inside = False
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._limit is None or self._passed < self._limit)
            self._passed += 1
            self._inside = True
        if self._stream is not None:
            self._stream = torch.cuda.current_stream(self._device)

    def _leave(self) -> None:
        with self._turn:
            self._inside = False
            self._turn.notify_all()

    def _guard(self, worker: Any) -> None:
        """Put the gate before the worker's methods: on the instance, where executors look them up each time."""
        execute, sample = getattr(worker, STEP), getattr(worker, SAMPLE, None)

        def execute_model(scheduled: Any, *arguments: Any, **more: Any) -> Any:
            self._enter()
            try:
                self.steps.note(scheduled)
                output = execute(scheduled, *arguments, **more)
            except BaseException:
                self._leave()
                raise
            if output is not None or sample is None:
                self._leave()
            return output

        def sample_tokens(*arguments: Any, **more: Any) -> Any:
            assert sample is not None
            try:
                return sample(*arguments, **more)
            finally:
                self._leave()

        worker.execute_model = execute_model
        if sample is not None:
            worker.sample_tokens = sample_tokens
        for name in OTHERS:
            setattr(worker, name, self._passed_by(getattr(worker, name)))

    def _passed_by(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **more: Any) -> Any:
            with self.passing():
                return method(*arguments, **more)

        return guarded


# A server need not ever see a sync.
MOST_GONE = 1 << 16


class StepWatch:
    """Sees every step's schedule before the worker runs it.

    With it a switch to new weights knows which tokens are of the old ones, though their steps may still be running:
    a step that computes a request up to its last known token makes one more. (Exact without speculative decoding.)
    """

    def __init__(self) -> None:
        self._prompts: dict[str, int] = {}
        self._made: dict[str, int] = {}
        # Ended since the last switch: their last tokens, or those of their siblings, may still be on their way.
        self._gone: dict[str, int] = {}
        self._last: Any = None

    def note(self, scheduled: Any) -> None:
        """A step, vLLM's `SchedulerOutput`, is about to run."""
        if self._last is not None:
            self._settle(self._last.num_scheduled_tokens.keys() - scheduled.num_scheduled_tokens.keys())
        cached = scheduled.scheduled_cached_reqs
        self._made.update(zip(cached.req_ids, cached.num_output_tokens, strict=True))
        for new in scheduled.scheduled_new_reqs:
            prompt = len(new.prompt_token_ids or ())
            self._prompts[new.req_id] = prompt
            # A request that is run again from its start brings the tokens that it has made.
            self._made[new.req_id] = len(getattr(new, "prefill_token_ids", None) or new.prompt_token_ids or ()) - prompt
        for request in scheduled.finished_req_ids:
            self._prompts.pop(request, None)
            self._gone[request] = self._made.pop(request, 0)
        while len(self._gone) > MOST_GONE:
            del self._gone[next(iter(self._gone))]
        self._last = scheduled

    def tokens(self) -> dict[str, int]:
        """Tokens by vLLM's request id, also of requests that ended since the last call; who is missing has not run."""
        if self._last is not None:
            self._settle(self._last.num_scheduled_tokens.keys())
            self._last = None
        gone, self._gone = self._gone, {}
        return gone | self._made

    def _settle(self, requests: Iterable[str]) -> None:
        """Count the tokens that the last step makes for these."""
        wanted = [request for request in requests if request in self._made]
        if not wanted:
            return
        cached = self._last.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in self._last.scheduled_new_reqs}
        for request in wanted:
            reached = computed[request] + self._last.num_scheduled_tokens[request]
            if reached >= self._prompts.get(request, 0) + self._made[request]:
                self._made[request] += 1
