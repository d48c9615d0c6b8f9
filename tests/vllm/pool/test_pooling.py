"""Single requests: streams, priorities, ids, conversations, prompts' own log-probabilities; where prompts go."""

import random
from typing import Any

import pytest
from models import build
from torchrun import run_facts

from rollcast.rollout.pool.router import BLOCK_TOKENS, Router

LONG = 300
KV_BLOCK_TOKENS = 32


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pooling")
    build("untied").save_pretrained(folder / "model")
    return run_facts("pooling.py", folder, ranks=3, timeout_s=250)


def vllm(test: Any) -> Any:
    return pytest.mark.vllm(pytest.mark.timeout(300)(test))


@vllm
def test_a_stream_is_the_completion_piece_by_piece(facts: dict[str, Any]) -> None:
    pieces = facts["streamed"]
    assert len(pieces) > 5
    assert [token for tokens, *_ in pieces for token in tokens] == facts["greedy"]
    assert all(len(tokens) == logprobs and spans == [[0, 0]] for tokens, logprobs, spans, _ in pieces)
    assert [reason for *_, reason in pieces] == [None] * (len(pieces) - 1) + ["length"]


@vllm
def test_a_stream_that_is_left_is_over(facts: dict[str, Any]) -> None:
    assert facts["left"] == [1, 0]


@vllm
def test_a_sync_cuts_a_stream_once(facts: dict[str, Any]) -> None:
    versions = [span[0] for _, _, spans, _ in facts["synced"] for span in spans]
    assert versions == sorted(versions) and len(set(versions)) == 2
    assert sum(len(tokens) for tokens, *_ in facts["synced"]) == LONG


@vllm
def test_samples_that_waited_in_the_engine_do_not_find_old_keys(facts: dict[str, Any]) -> None:
    newest = facts["queued"][-1][0]
    assert len(newest) == 1
    late = [distance for versions, distance in facts["queued"] if versions == newest]
    assert len(late) >= 4 and max(late) < 1e-4, facts["queued"]


@vllm
def test_prompts_have_the_log_probabilities_of_transformers(facts: dict[str, Any]) -> None:
    assert len(facts["prompt"]) == 3 and max(facts["prompt"]) < 1e-4


@vllm
def test_requests_end_by_id_or_all_with_what_they_have(facts: dict[str, Any]) -> None:
    (one,), (other,), several = facts["aborted"]
    assert other == [LONG, LONG, "length"]
    for tokens, logprobs, reason in (one, *several):
        assert 0 <= tokens == logprobs < LONG and reason == "abort"
    assert len(several) == 6 and one[0] > 0
    assert facts["twice"].startswith("ValueError: request 'a' is under way") and facts["twice"].endswith("0 under way")


@vllm
def test_urgent_requests_overtake_those_that_wait(facts: dict[str, Any]) -> None:
    order = facts["priorities"]
    assert len(order) == 24 and order.count("urgent") == 2
    assert max(place for place, name in enumerate(order) if name == "urgent") < 18


@vllm
def test_a_conversation_goes_on_where_its_prefix_is_cached(facts: dict[str, Any]) -> None:
    for tokens, cached in facts["conversation"][2:]:
        # All of the turn before but its last, unfinished block, and the new words.
        assert cached >= tokens - 3 - 2 * KV_BLOCK_TOKENS, facts["conversation"]


def test_prompts_go_where_least_is_to_do() -> None:
    router = Router(3)
    for index in range(30):
        router.start([index], tokens=9)
    assert router.loads == (100, 100, 100)
    for engine in (1, 1, 1):
        router.end(engine, [0], tokens=9)
    assert [router.start([99], tokens=9) for _ in range(3)] == [1, 1, 1]


def test_a_holder_of_the_prefix_is_preferred_until_it_is_far_behind() -> None:
    router, talk = Router(2), list(range(3 * BLOCK_TOKENS))
    first = router.start(talk, tokens=10)
    assert first == 0
    router.hold([*talk, *range(100, 140)], first)
    assert router.start([*talk, *range(100, 120)], tokens=10) == 0
    assert router.start([7] * 8, tokens=10) == 1
    went = [router.start(talk, tokens=1000) for _ in range(10)]
    assert set(went) == {0, 1} and abs(router.loads[0] - router.loads[1]) < 2200


def test_pools_of_several_ranks_do_not_all_begin_with_one_engine() -> None:
    assert [Router(4, first=rank).start([1], tokens=1) for rank in range(4)] == [0, 1, 2, 3]


def test_loads_come_back_to_nothing() -> None:
    rng, router = random.Random(3), Router(4)
    running: list[Any] = []
    for _ in range(500):
        if running and rng.random() < 0.45:
            router.end(*running.pop(rng.randrange(len(running)))[:2], tokens=5)
        else:
            prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 60))]
            running.append((router.start(prompt, tokens=5), prompt))
        assert min(router.loads) >= 0
    for engine, prompt in running:
        router.end(engine, prompt, tokens=5)
    assert router.loads == (0, 0, 0, 0)
