"""How many tokens each request has when every step launched so far is done (worker)."""

from collections.abc import Iterable
from typing import Any

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
