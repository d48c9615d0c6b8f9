"""Metrics of a trainer rank's pool and syncs, in Prometheus' format (trainer)."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from rollcast.comm import SyncReport
from rollcast.rollout.protocol.sampling import Completion


class Metrics:
    """Counters and gauges of one rank, in a Prometheus registry of their own.

        metrics = Metrics()
        metrics.serve(9400)             # http://localhost:9400/metrics

    Rates are left to the queries: tokens a second are `rate(rollcast_tokens_total[1m])`.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.syncs = Counter("rollcast_syncs", "Syncs, by outcome.", ["outcome"], registry=registry)
        self.sync_seconds = Counter(
            "rollcast_sync_seconds", "Seconds of syncs that succeeded, by phase.", ["phase"], registry=registry
        )
        self.sync_bytes = Counter("rollcast_sync_bytes", "Bytes of weights sent, counted once.", registry=registry)
        self.version = Gauge("rollcast_policy_version", "Policy version that the engines serve.", registry=registry)
        self.requests = Gauge("rollcast_requests", "Requests in flight, by engine.", ["engine"], registry=registry)
        self.load = Gauge(
            "rollcast_load_tokens",
            "Tokens that may still be computed, by engine.",
            ["engine"],
            registry=registry,
        )
        self.completions = Counter(
            "rollcast_completions", "Completions, by finish reason.", ["finish_reason"], registry=registry
        )
        self.tokens = Counter("rollcast_tokens", "Tokens sampled, by engine.", ["engine"], registry=registry)
        self.cached_tokens = Counter(
            "rollcast_cached_prompt_tokens", "Tokens of prompts found in the prefix cache.", registry=registry
        )
        self.stale_drops = Counter(
            "rollcast_stale_drops", "Samples dropped because their policy was too old.", registry=registry
        )

    def synced(self, report: SyncReport) -> None:
        """Count a sync that succeeded."""
        self.syncs.labels("ok").inc()
        for phase, seconds in report.phases_s.items():
            self.sync_seconds.labels(phase).inc(seconds)
        self.sync_bytes.inc(report.nbytes)
        self.version.set(report.version)

    def failed(self) -> None:
        """Count a sync that failed."""
        self.syncs.labels("failed").inc()

    def requests_changed(self, engine: int, change: int, *, load_tokens: int) -> None:
        """Add `change` to an engine's requests in flight, and set the tokens that it may still have to compute."""
        self.requests.labels(engine).inc(change)
        self.load.labels(engine).set(load_tokens)

    def finished(self, engine: int, group: Sequence[Completion]) -> None:
        """Count the completions of a request that an engine has finished."""
        for completion in group:
            self.completions.labels(completion.finish_reason).inc()
            self.tokens.labels(engine).inc(len(completion.token_ids))
            self.cached_tokens.inc(completion.cached_tokens)

    def serve(self, port: int, *, host: str = "0.0.0.0") -> int:
        """Serve `/metrics` on a thread until the process ends, and return the port (0: a free one)."""
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        return server.server_port
