"""Output tokens are counted from vLLM's schedules, before their steps have run."""

from types import SimpleNamespace
from typing import Any

from rollcast.rollout.worker.step_gate import MAX_ENDED_REQUESTS, TokenCounter


def step(
    scheduled: dict[str, int],
    *,
    new: dict[str, tuple[int, int, int]] | None = None,
    cached: dict[str, tuple[int, int]] | None = None,
    finished: tuple[str, ...] = (),
) -> Any:
    """Return a schedule: `new` by prompt, known and computed tokens; `cached` by computed and output tokens."""
    news = [
        SimpleNamespace(
            req_id=name, prompt_token_ids=[0] * prompt, prefill_token_ids=[0] * known, num_computed_tokens=computed
        )
        for name, (prompt, known, computed) in (new or {}).items()
    ]
    old = cached or {}
    cached_requests = SimpleNamespace(
        req_ids=list(old),
        num_computed_tokens=[computed for computed, _ in old.values()],
        num_output_tokens=[output for _, output in old.values()],
    )
    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        scheduled_new_reqs=news,
        scheduled_cached_reqs=cached_requests,
        finished_req_ids=set(finished),
    )


def test_a_step_that_ends_a_prompt_samples_a_token() -> None:
    counter = TokenCounter()
    assert counter.take() == {}
    counter.record_step(step({"a": 5, "b": 3}, new={"a": (5, 5, 0), "b": (8, 8, 0)}))
    assert counter.take() == {"a": 1, "b": 0}
    counter.record_step(step({"a": 1, "b": 5}, cached={"a": (5, 1), "b": (3, 0)}))
    assert counter.take() == {"a": 2, "b": 1}
    assert counter.take() == {"a": 2, "b": 1}


def test_requests_that_wait_or_end_keep_their_count() -> None:
    counter = TokenCounter()
    counter.record_step(step({"a": 2, "b": 2}, new={"a": (2, 2, 0), "b": (2, 2, 0)}))
    counter.record_step(step({"a": 1}, cached={"a": (2, 1)}))
    counter.record_step(step({}, finished=("a",)))
    assert counter.take() == {"a": 2, "b": 1}
    # Preempted, it starts again with the token that it has sampled.
    counter.record_step(step({"b": 3}, new={"b": (2, 3, 0)}))
    assert counter.take() == {"b": 2}


def test_a_server_that_never_sees_a_sync_forgets() -> None:
    counter = TokenCounter()
    for name in map(str, range(MAX_ENDED_REQUESTS + 10)):
        counter.record_step(step({name: 1}, new={name: (1, 1, 0)}))
        counter.record_step(step({}, finished=(name,)))
    tokens = counter.take()
    assert len(tokens) == MAX_ENDED_REQUESTS and list(tokens)[-1] == str(MAX_ENDED_REQUESTS + 9)
