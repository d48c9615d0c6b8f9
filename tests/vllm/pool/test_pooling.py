"""Single requests: streams, priorities, ids, conversations, prompts' own log-probabilities."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jobs import SharedJob
from oracle import distances, error_text, greedy_tokens
from shapes import KV_BLOCK_TOKENS
from trainer import Trainer

from rollcast.rollout import Completion, Pool, Sampling

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

LENGTH = 300
STEP_S = 0.01
ATTEMPTS = 8
GREEDY = Sampling(temperature=0.0, max_tokens=40, ignore_eos=True)
QUEUED_LENGTH = 100
ENDLESS = Sampling(max_tokens=LENGTH, ignore_eos=True)
PROMPT = [5, 6, 7]


@pytest.fixture
def trainer(two_engines: SharedJob) -> Trainer:
    two_engines.trainer.pace(STEP_S)
    return two_engines.trainer


@pytest.fixture
def pool(trainer: Trainer) -> Pool:
    return trainer.pool


@dataclass(frozen=True)
class StreamPiece:
    """One piece of a stream, without its log-probabilities."""

    tokens: list[int]
    logprobs: int
    versions: list[int]
    starts: list[int]
    finish_reason: str | None


async def read_stream(pool: Pool, prompt: list[int], sampling: Sampling) -> list[StreamPiece]:
    return [
        StreamPiece(
            piece.token_ids,
            len(piece.logprobs),
            [version for version, _ in piece.spans],
            [start for _, start in piece.spans],
            piece.finish_reason,
        )
        async for piece in pool.stream(prompt, sampling)
    ]


def until(act: Callable[[], Any], met: Callable[[Any], bool]) -> Any:
    """What `act` returns, again if it came too late for what it was to meet: a busy machine may stop this process."""
    result = act()
    for _ in range(ATTEMPTS):
        if met(result):
            break
        result = act()
    return result


def in_flight(pool: Pool) -> int:
    return sum(engine.requests for engine in pool.describe())


def left_in_flight(pool: Pool) -> int:
    """Requests in flight when that does not change any more, or after a while."""
    end = time.monotonic() + 10.0
    while in_flight(pool) and time.monotonic() < end:
        time.sleep(0.05)
    return in_flight(pool)


def wait_for_start(pool: Pool, count: int) -> None:
    """Wait until so many requests are in flight, and a little; no longer than they take."""
    end = time.monotonic() + LENGTH * STEP_S
    while in_flight(pool) < count and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(0.1)


def test_a_stream_is_the_completion_piece_by_piece(trainer: Trainer) -> None:
    pieces = asyncio.run(read_stream(trainer.pool, PROMPT, GREEDY))
    assert len(pieces) > 5
    assert [token for piece in pieces for token in piece.tokens] == greedy_tokens(trainer.model, PROMPT, 40)
    for piece in pieces:
        assert (len(piece.tokens), piece.versions, piece.starts) == (piece.logprobs, [trainer.version], [0])
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_a_stream_that_is_left_is_over(pool: Pool) -> None:
    async def leave_early() -> int:
        stream = pool.stream(PROMPT, ENDLESS)
        await anext(stream)
        before = in_flight(pool)
        await stream.aclose()
        return before

    assert asyncio.run(leave_early()) == 1
    assert left_in_flight(pool) == 0


def test_a_sync_cuts_a_stream_once(trainer: Trainer) -> None:
    def sync_while_streaming() -> list[StreamPiece]:
        pieces: list[StreamPiece] = []
        thread = threading.Thread(target=lambda: pieces.extend(asyncio.run(read_stream(trainer.pool, PROMPT, ENDLESS))))
        thread.start()
        wait_for_start(trainer.pool, 1)
        trainer.update()
        thread.join()
        return pieces

    pieces = until(sync_while_streaming, lambda pieces: pieces[0].versions != pieces[-1].versions)
    versions = [version for piece in pieces for version in piece.versions]
    assert versions == sorted(versions) and len(set(versions)) == 2
    assert sum(len(piece.tokens) for piece in pieces) == LENGTH


def test_samples_that_waited_in_the_engine_do_not_find_old_keys(trainer: Trainer) -> None:
    """More samples of one long prompt than run at a time, which a sync meets."""
    prompt = [3 + place % 30 for place in range(80)]

    def sync_while_some_wait() -> list[Completion]:
        running = trainer.pool.submit(prompt, Sampling(max_tokens=QUEUED_LENGTH, ignore_eos=True, n=16))
        wait_for_start(trainer.pool, 1)
        trainer.update()
        return running.result()

    samples = until(sync_while_some_wait, lambda samples: samples[0].versions != samples[-1].versions)
    newest = samples[-1].versions
    assert len(newest) == 1
    late = [distances(trainer.model, prompt, sample).max().item() for sample in samples if sample.versions == newest]
    assert len(late) >= 4 and max(late) < 1e-4


def test_prompts_have_the_log_probabilities_of_transformers(trainer: Trainer) -> None:
    prompt = [5, 6, 7, 9, 11, 4, 3, 2, 8]
    sampling = Sampling(max_tokens=3, n=3, ignore_eos=True, prompt_logprobs=True)
    (samples,) = trainer.pool.generate([prompt], sampling)
    with torch.no_grad():
        logprobs = trainer.model(torch.tensor([prompt])).logits.log_softmax(-1)[0]
    expected = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert len(samples) == 3
    for sample in samples:
        first, *rest = sample.prompt_logprobs or []
        assert first is None
        assert (torch.tensor(rest) - expected).abs().max().item() < 1e-4


def test_requests_end_by_id_or_all_with_what_they_have(pool: Pool) -> None:
    def end_some() -> tuple[Completion, Completion, list[Completion]]:
        by_id, untouched = (pool.submit(PROMPT, ENDLESS, request_id=name) for name in ("one", "other"))
        wait_for_start(pool, 2)
        pool.abort(["one", "nobody"])
        (ended,), (whole,) = by_id.result(30.0), untouched.result(60.0)
        several = pool.submit(PROMPT, Sampling(max_tokens=LENGTH, ignore_eos=True, n=6))
        wait_for_start(pool, 1)
        pool.abort()
        return ended, whole, several.result(30.0)

    # Not before its first token, nor behind its last.
    ended, whole, several = until(
        end_some, lambda result: result[0].finish_reason == "abort" and result[0].token_ids != []
    )
    assert (len(whole.token_ids), len(whole.logprobs), whole.finish_reason) == (LENGTH, LENGTH, "length")
    for sample in (ended, *several):
        assert 0 <= len(sample.token_ids) == len(sample.logprobs) < LENGTH and sample.finish_reason == "abort"
    assert len(several) == 6 and ended.token_ids


def test_an_id_is_in_use_until_its_request_ends(pool: Pool) -> None:
    problem = error_text(lambda: [pool.submit([1], ENDLESS, request_id="a") for _ in range(2)])
    assert problem.startswith("ValueError: request 'a' is under way")
    pool.abort()
    assert left_in_flight(pool) == 0


def test_urgent_requests_overtake_those_that_wait(pool: Pool) -> None:
    """More than the engines run at a time, the last of them urgent."""
    order: list[str] = []
    lock = threading.Lock()

    def note(name: str) -> Callable[[Any], None]:
        def done(_: Any) -> None:
            with lock:
                order.append(name)

        return done

    sampling = Sampling(max_tokens=100, ignore_eos=True)
    futures = []
    for index in range(24):
        name, priority = ("urgent", -1) if index >= 22 else ("patient", 0)
        futures.append(pool.submit([*PROMPT, index], sampling, priority=priority))
        futures[-1].add_done_callback(note(name))
    for future in futures:
        future.result(120.0)
    # A callback may run after the result is there.
    end = time.monotonic() + 10.0
    while len(order) < 24 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(order) == 24 and order.count("urgent") == 2
    assert max(place for place, name in enumerate(order) if name == "urgent") < 18


def test_a_conversation_goes_on_where_its_prefix_is_cached(pool: Pool) -> None:
    """Two conversations of three turns. In between others come: only the prefix shows where a conversation was."""
    conversations = [[start + place % 7 for place in range(40)] for start in (3, 30)]
    for turn in range(3):
        groups = pool.generate(conversations, Sampling(max_tokens=32, ignore_eos=True))
        for conversation, (sample,) in zip(conversations, groups, strict=True):
            # All of the turn before but its last, unfinished block, and the new tokens.
            assert turn == 0 or sample.cached_tokens >= len(conversation) - 3 - 2 * KV_BLOCK_TOKENS, turn
            conversation += [*sample.token_ids, 1, 2, 3]
        pool.generate([[40, number] for number in range(3)], Sampling(max_tokens=4))
