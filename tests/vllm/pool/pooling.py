"""What a pool does with single requests: streams, priorities, ids, conversations, prompts' own log-probabilities.

pooling.py MODEL_FOLDER REPORT.json         (run by torchrun: one trainer, two engines)
"""

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from exact import greedy_tokens
from models import build, perturb
from oracle import distances, said

import rollcast.rollout as rollcast

LONG = 300
STEP_S = 0.01
GREEDY = rollcast.Sampling(temperature=0.0, max_tokens=40, ignore_eos=True)
ENDLESS = rollcast.Sampling(max_tokens=LONG, ignore_eos=True)


def main() -> None:
    folder, report = sys.argv[1], Path(sys.argv[2])
    config = rollcast.RolloutConfig(
        model=folder,
        enforce_eager=True,
        log_dir=folder,
        max_num_seqs=4,
        engine_args={"block_size": 32},
        worker_extension_cls="slow_worker.SlowWorker",
    )
    with rollcast.join(config) as job:
        if job.is_trainer:
            report.write_text(json.dumps(facts(job)))


def facts(job: rollcast.Job) -> dict[str, Any]:
    model = build("untied")
    broadcaster = job.broadcaster(model)
    # Later syncs are soon over.
    broadcaster.self_test()
    pool = job.pool
    pool.call_workers("slow_down", STEP_S)
    return {
        "greedy": greedy_tokens(model, [5, 6, 7], 40),
        "streamed": asyncio.run(streamed(pool, [5, 6, 7], GREEDY)),
        "left": asyncio.run(left(pool)),
        "prompt": prompt_logprobs(pool, model),
        "aborted": until(lambda: aborted(pool), lambda found: found[0][0][2] == "abort"),
        "twice": said(lambda: [pool.submit([1], ENDLESS, request_id="a") for _ in range(2)]) + ended(pool),
        "priorities": priorities(pool),
        "conversation": conversation(pool),
        "synced": until(lambda: synced(pool, broadcaster, model), lambda found: found[0][2] != found[-1][2]),
        "queued": until(lambda: queued(pool, broadcaster, model), lambda found: found[0][0] != found[-1][0]),
    }


def until(act: Callable[[], Any], met: Callable[[Any], bool]) -> Any:
    """What `act` finds, again if it came too late for what it was to meet: a busy machine may stop this process."""
    found = act()
    for _ in range(8):
        if met(found):
            break
        found = act()
    return found


async def streamed(pool: rollcast.Pool, prompt: list[int], sampling: rollcast.Sampling) -> list[Any]:
    """Tokens, versions and finish reason of every piece."""
    return [
        [its.token_ids, len(its.logprobs), its.spans, its.finish_reason] async for its in pool.stream(prompt, sampling)
    ]


async def left(pool: rollcast.Pool) -> list[int]:
    """Requests under way: while a stream is read, and after it was left."""
    stream = pool.stream([5, 6, 7], ENDLESS)
    await anext(stream)
    before = under_way(pool)
    await stream.aclose()
    return [before, settled(pool)]


def under_way(pool: rollcast.Pool) -> int:
    return sum(engine.requests for engine in pool.describe())


def settled(pool: rollcast.Pool) -> int:
    """Requests under way when that does not change any more, or after a while."""
    end = time.monotonic() + 10.0
    while under_way(pool) and time.monotonic() < end:
        time.sleep(0.05)
    return under_way(pool)


def started(pool: rollcast.Pool, count: int) -> None:
    """Wait until so many requests are under way, and a little; no longer than they take."""
    end = time.monotonic() + LONG * STEP_S
    while under_way(pool) < count and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(0.1)


def ended(pool: rollcast.Pool) -> str:
    pool.abort()
    return f", then {settled(pool)} under way"


def prompt_logprobs(pool: rollcast.Pool, model: Any) -> list[float]:
    """Largest differences from transformers' own, for each sample, and how many there are."""
    prompt = [5, 6, 7, 9, 11, 4, 3, 2, 8]
    sampling = rollcast.Sampling(max_tokens=3, n=3, ignore_eos=True, prompt_logprobs=True)
    (group,) = pool.generate([prompt], sampling)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits.log_softmax(-1)[0]
    wanted = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    found = [its.prompt_logprobs or [] for its in group]
    assert all(its[0] is None for its in found)
    return [(torch.tensor(its[1:]) - wanted).abs().max().item() for its in found]


def aborted(pool: rollcast.Pool) -> list[Any]:
    """Length and finish reason: of one that is ended by its id, of one that is not, and of all at once."""
    one, other = (pool.submit([5, 6, 7], ENDLESS, request_id=name) for name in ("one", "other"))
    started(pool, 2)
    pool.abort(["one", "nobody"])
    found = [one.result(30.0), other.result(60.0)]
    several = pool.submit([5, 6, 7], rollcast.Sampling(max_tokens=LONG, ignore_eos=True, n=6))
    started(pool, 1)
    pool.abort()
    found.append(several.result(30.0))
    return [[[len(its.token_ids), len(its.logprobs), its.finish_reason] for its in group] for group in found]


def priorities(pool: rollcast.Pool) -> list[str]:
    """The order in which requests end: more than the engines run at a time, the last of them urgent."""
    order: list[str] = []
    lock = threading.Lock()

    def note(name: str) -> Callable[[Any], None]:
        def done(_: Any) -> None:
            with lock:
                order.append(name)

        return done

    sampling = rollcast.Sampling(max_tokens=100, ignore_eos=True)
    futures = []
    for index in range(24):
        name, priority = ("urgent", -1) if index >= 22 else ("patient", 0)
        futures.append(pool.submit([5, 6, 7, index], sampling, priority=priority))
        futures[-1].add_done_callback(note(name))
    for future in futures:
        future.result(120.0)
    return order


def conversation(pool: rollcast.Pool) -> list[list[int]]:
    """Two conversations of three turns: of each turn, the prompt's tokens and how many were cached."""
    found: list[list[int]] = []
    talks = [[start + place % 7 for place in range(40)] for start in (3, 30)]
    for _ in range(3):
        groups = pool.generate(talks, rollcast.Sampling(max_tokens=32, ignore_eos=True))
        found += [[len(talk), group[0].cached_tokens] for talk, group in zip(talks, groups, strict=True)]
        talks = [[*talk, *group[0].token_ids, 1, 2, 3] for talk, group in zip(talks, groups, strict=True)]
        # In between others come, so that only the prefix can say where a conversation was.
        pool.generate([[40, turn] for turn in range(3)], rollcast.Sampling(max_tokens=4))
    return found


def synced(pool: rollcast.Pool, broadcaster: rollcast.PoolBroadcaster, model: Any) -> list[Any]:
    """A stream that a sync meets half way: its pieces, and its spans when it is over."""
    pieces: list[Any] = []
    thread = threading.Thread(target=lambda: pieces.extend(asyncio.run(streamed(pool, [5, 6, 7], ENDLESS))))
    thread.start()
    started(pool, 1)
    perturb(model, seed=1)
    broadcaster.sync(version=broadcaster.version + 1)
    thread.join()
    return pieces


def queued(pool: rollcast.Pool, broadcaster: rollcast.PoolBroadcaster, model: Any) -> list[Any]:
    """Versions of more samples of one long prompt than run at a time, and how far each is from the new weights."""
    prompt = [3 + place % 30 for place in range(80)]
    running = pool.submit(prompt, rollcast.Sampling(max_tokens=LONG, ignore_eos=True, n=16))
    started(pool, 1)
    perturb(model, seed=2)
    broadcaster.sync(version=broadcaster.version + 1)
    return [[its.versions, distances(model, prompt, its).max().item()] for its in running.result()]


if __name__ == "__main__":
    main()
