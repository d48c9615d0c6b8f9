"""Requests that a sync meets half way, and the pool's and broadcaster's refusals."""

import pytest
from in_flight import LENGTH, distances_after_switch, refusals, sync_in_flight
from jobs import SharedJob

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(300),
    # One trainer and one worker; two trainers and an engine of two workers.
    pytest.mark.parametrize("shared_job", ["one_engine", "two_trainers"], indirect=True),
]


@pytest.mark.parametrize(
    ("mode", "pause_mode", "kv_cache"),
    [
        ("in_place", "keep", "kept"),
        ("in_place", "abort", "kept"),
        ("shadow", "keep", "kept"),
        ("in_place", "keep", "recomputed"),
        ("shadow", "abort", "kept"),
    ],
)
def test_requests_are_cut_at_the_very_token_and_go_on(
    shared_job: SharedJob, mode: str, pause_mode: str, kv_cache: str
) -> None:
    """Before the cut the log-probabilities are the old weights' own; right behind it they are not.

    Where keys and values are made anew, all that is behind is the new weights' own.
    """
    old = shared_job.trainer.version
    options = {"mode": mode, "pause_mode": pause_mode, "kv_cache": kv_cache}
    for samples in shared_job.on_trainers(sync_in_flight, options):
        behind: list[float] = []
        for sample in samples:
            assert (sample.tokens, sample.logprobs, sample.finish_reason) == (LENGTH, LENGTH, "length")
            assert sample.versions in ([old], [old, old + 1], [old + 1])
            if sample.cut is not None:
                assert sample.cut.old_before < 1e-4
                behind.append(sample.cut.old_behind)
                assert (sample.cut.new_behind < 1e-4) is not (pause_mode == "keep" and kv_cache == "kept")
        assert len(behind) >= 12
        # A single token can happen to be as likely under both.
        assert sum(difference > 1e-4 for difference in behind) > 0.8 * len(behind)


def test_wait_lets_requests_finish_under_the_old_version(shared_job: SharedJob) -> None:
    old = shared_job.trainer.version
    for samples in shared_job.on_trainers(sync_in_flight, {"mode": "in_place", "pause_mode": "wait"}):
        assert len(samples) >= 12
        for sample in samples[:12]:
            assert (sample.tokens, sample.logprobs, sample.finish_reason) == (LENGTH, LENGTH, "length")
            assert sample.versions == [old]


def test_the_old_prefix_cache_serves_nobody(shared_job: SharedJob) -> None:
    for distances in shared_job.on_trainers(distances_after_switch):
        assert len(distances) == 3 and max(distances) < 1e-4


def test_refusals_say_what_to_do(shared_job: SharedJob) -> None:
    version = shared_job.trainer.version
    for found in shared_job.on_trainers(refusals):
        assert found.replaced.startswith("RuntimeError: this broadcaster was closed")
        assert found.not_newer == f"ValueError: version must grow: {version} after {version}"
        assert "unknown pause_mode 'never', expected one of keep, wait, abort" in found.unknown_mode
        assert found.newer_version == version + 1
        assert found.long_prompt.startswith("ValueError: prompt 1 has 1024 tokens, but max_model_len is 1024")
