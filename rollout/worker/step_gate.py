"""Change weights between two steps of a running worker, without vLLM's scheduler (vLLM worker process)."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rollcast.comm import Deadline

# vLLM's calls that read weights or move them. A step is `execute_model`, followed by `sample_tokens` if that has
# returned None.
STEP, SAMPLE, OTHER_CALLS = "execute_model", "sample_tokens", ("sleep", "wake_up")
STEP_UNDER_WAY = "vLLM's step under way"
# Requests that ended since the last sync and are remembered: a server may run for ever without a sync.
MAX_ENDED_REQUESTS = 1 << 16


class StepGate:
    """Serializes vLLM's calls into this worker (execute_model, sample_tokens, sleep, wake_up) with weight updates.

        with gate.closed(agree, prepare, deadline=deadline):
            ...                                     # no call is under way, and none begins

    Another thread closes the gate to change weights between two calls. The workers of an engine get the same calls in
    the same order and must stop after the same one: a step that only half of them have begun would wait for the other
    half for ever. So each publishes how many calls it has let in, and all go on to the largest number.
    On a GPU, the work of calls that have returned may still be queued: `side_stream` runs the caller's work beside it,
    `worker_stream` after it.
    """

    def __init__(self, worker: Any) -> None:
        """Wrap the methods of vLLM's `worker`. Called on vLLM's thread, before the first request."""
        self.tokens = TokenCounter()
        device = torch.device(worker.device)
        on_gpu = device.type == "cuda"
        self._device = device
        # The one that vLLM's thread uses.
        self._stream = torch.cuda.current_stream(device) if on_gpu else None
        self._side_stream = torch.cuda.Stream(device) if on_gpu else None
        self._changed = threading.Condition()
        self._calls = 0
        self.other_calls = 0
        """Calls so far that were not steps. Of all that vLLM calls, only these are known to move weights."""
        self._limit: int | None = None
        self._inside = False
        self._wrap_methods(worker)

    @contextmanager
    def closed(
        self, agree: Callable[[int], int], prepare: Callable[[], None] | None = None, *, deadline: Deadline
    ) -> Iterator[None]:
        """Close the gate inside the context. Collective over the engine's workers.

        `agree` takes how many calls this worker has let in, and returns after how many all of them stop. `prepare` is
        called while the last of these may still be under way. Raises `TimeoutError`, and then the context is not
        entered.
        """
        with self._changed:
            self._limit = self._calls
        try:
            limit = agree(self._limit)
            if prepare is not None:
                prepare()
            self._wait_until_stopped(limit, deadline)
            yield
        finally:
            with self._changed:
                self._limit = None
                self._changed.notify_all()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Let in a call of vLLM's that is not a step. On vLLM's thread."""
        self._enter()
        self.other_calls += 1
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def side_stream(self) -> Iterator[torch.cuda.Stream | None]:
        """Put the caller's GPU work on a stream of its own, which this yields, beside the worker's."""
        if self._side_stream is None:
            yield None
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._side_stream):
            yield self._side_stream

    @contextmanager
    def worker_stream(self) -> Iterator[None]:
        """Put the caller's GPU work on the worker's own stream, between the queued steps and the next one."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    @property
    def gpu_busy(self) -> bool:
        """Whether the GPU still has steps to run."""
        return self._stream is not None and not self._stream.query()

    def order_after_steps(self, stream: torch.cuda.Stream | None) -> None:
        """Make later work on `stream` wait for the steps that are queued."""
        if stream is not None and self._stream is not None:
            stream.wait_stream(self._stream)

    def _wait_until_stopped(self, limit: int, deadline: Deadline) -> None:
        with self._changed:
            self._limit = limit
            self._changed.notify_all()
            while self._calls < limit or self._inside:
                self._changed.wait(deadline.left(STEP_UNDER_WAY).total_seconds())

    def _enter(self) -> None:
        with self._changed:
            # A step that was never sampled is over.
            self._inside = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._limit is None or self._calls < self._limit)
            self._calls += 1
            self._inside = True
        if self._stream is not None:
            self._stream = torch.cuda.current_stream(self._device)

    def _leave(self) -> None:
        with self._changed:
            self._inside = False
            self._changed.notify_all()

    def _wrap_methods(self, worker: Any) -> None:
        """Replace the methods on the instance: executors look them up there at every call."""
        execute, sample = getattr(worker, STEP), getattr(worker, SAMPLE, None)

        def execute_model(scheduled: Any, *arguments: Any, **options: Any) -> Any:
            self._enter()
            try:
                self.tokens.record_step(scheduled)
                output = execute(scheduled, *arguments, **options)
            except BaseException:
                self._leave()
                raise
            if output is not None or sample is None:
                self._leave()
            return output

        def sample_tokens(*arguments: Any, **options: Any) -> Any:
            assert sample is not None
            try:
                return sample(*arguments, **options)
            finally:
                self._leave()

        worker.execute_model = execute_model
        if sample is not None:
            worker.sample_tokens = sample_tokens
        for name in OTHER_CALLS:
            setattr(worker, name, self._wrapped(getattr(worker, name)))

    def _wrapped(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            with self.passing():
                return method(*arguments, **options)

        return guarded


class TokenCounter:
    """Counts each request's output tokens from the schedules of the steps, before the worker runs them.

    With it a switch to new weights knows which tokens come from the old ones, though their steps may still be queued:
    a step that computes a request up to its last known token samples one more. (Exact without speculative decoding.)
    """

    def __init__(self) -> None:
        self._prompt_tokens: dict[str, int] = {}
        self._output_tokens: dict[str, int] = {}
        # Requests that ended since the last switch: their last tokens, or those of their siblings, may not have been
        # handed out yet.
        self._ended: dict[str, int] = {}
        self._last: Any = None

    def record_step(self, scheduled: Any) -> None:
        """Record a step that is about to run: vLLM's `SchedulerOutput`."""
        if self._last is not None:
            self._count_last_step(self._last.num_scheduled_tokens.keys() - scheduled.num_scheduled_tokens.keys())
        cached = scheduled.scheduled_cached_reqs
        self._output_tokens.update(zip(cached.req_ids, cached.num_output_tokens, strict=True))
        for new in scheduled.scheduled_new_reqs:
            prompt = len(new.prompt_token_ids or ())
            known = len(getattr(new, "prefill_token_ids", None) or new.prompt_token_ids or ())
            self._prompt_tokens[new.req_id] = prompt
            # A preempted request that starts again brings the tokens that it has sampled.
            self._output_tokens[new.req_id] = known - prompt
        for request in scheduled.finished_req_ids:
            self._prompt_tokens.pop(request, None)
            self._ended[request] = self._output_tokens.pop(request, 0)
        while len(self._ended) > MAX_ENDED_REQUESTS:
            del self._ended[next(iter(self._ended))]
        self._last = scheduled

    def take(self) -> dict[str, int]:
        """Return output tokens by vLLM's request id, with requests that ended since the last call; forget those.

        A request that is missing has not run.
        """
        if self._last is not None:
            self._count_last_step(self._last.num_scheduled_tokens.keys())
            self._last = None
        ended, self._ended = self._ended, {}
        return ended | self._output_tokens

    def _count_last_step(self, requests: Iterable[str]) -> None:
        """Count the tokens that the last step samples for `requests`."""
        running = [request for request in requests if request in self._output_tokens]
        if not running:
            return
        cached = self._last.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in self._last.scheduled_new_reqs}
        for request in running:
            reached = computed[request] + self._last.num_scheduled_tokens[request]
            if reached >= self._prompt_tokens.get(request, 0) + self._output_tokens[request]:
                self._output_tokens[request] += 1
