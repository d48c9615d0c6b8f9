"""Where prompts go: to the engine that holds their prefix, or that has least to do."""

import random
from typing import Any

from rollcast.rollout.pool.router import BLOCK_TOKENS, Router


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
