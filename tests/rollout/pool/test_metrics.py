"""Metrics as a scrape returns them."""

import urllib.request

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from rollcast.comm import SyncReport
from rollcast.rollout.pool.metrics import Metrics
from rollcast.rollout.protocol.sampling import Completion


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


def test_syncs_and_completions_are_counted() -> None:
    metrics = Metrics()
    for version in (1, 2):
        metrics.synced(SyncReport(version, 1000, {"wire": 0.25, "total": 0.5}))
    metrics.failed()
    completion = Completion([1, 2, 3], [0.0] * 3, "length", ((0, 0),), cached_tokens=16)
    metrics.finished(1, [completion, completion])
    values = samples(metrics)
    assert values["rollcast_syncs_total", "ok"] == 2 and values["rollcast_syncs_total", "failed"] == 1
    assert (
        values["rollcast_sync_seconds_total", "wire"] == 0.5 and values["rollcast_sync_seconds_total", "total"] == 1.0
    )
    assert values["rollcast_sync_bytes_total",] == 2000 and values["rollcast_policy_version",] == 2
    assert values["rollcast_tokens_total", "1"] == 6 and values["rollcast_completions_total", "length"] == 2
    assert values["rollcast_cached_prompt_tokens_total",] == 32


def test_scrapes_are_answered() -> None:
    metrics = Metrics()
    metrics.stale_drops.inc(3)
    port = metrics.serve(0, host="127.0.0.1")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert "rollcast_stale_drops_total 3.0" in answer.read().decode()
