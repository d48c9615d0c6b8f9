"""One attempt to bring all engines to a new version, as two-phase commit (every trainer rank).

The other two parts of the same story are `engine/sync.py` (engine process) and `worker/sync.py` (vLLM's workers).
"""

from concurrent.futures import Future, wait
from dataclasses import dataclass

from rollcast.comm import Deadline, Manifest, PhaseTimer, SyncReport, WeightSource, digest_of
from rollcast.comm.agreement import Agreement, unanimous
from rollcast.comm.report import WorkerReport
from rollcast.rollout.config import RolloutConfig, SyncOptions
from rollcast.rollout.errors import EngineError, Failure, SyncError
from rollcast.rollout.pool import Pool
from rollcast.rollout.pool.client import collect
from rollcast.rollout.protocol.messages import AbortSync, Commit, Finalize, Receive, Received, Reply, Request, expect
from rollcast.rollout.sync.lanes import Lanes
from rollcast.rollout.sync.outcome import StepOutcome, agree_on

# Shares of `sync_timeout_s`. What is left after the transfer is for the engines' reports of failures, the commit and
# the agreements on both, so that all ranks raise in time.
TRANSFER_SHARE = 0.8
FAILURE_REPORT_SHARE = 0.1
# Share of the transfer's time for joining groups; the rest is for agreeing on whether all ranks have joined.
JOIN_SHARE = 0.9
# Share of the remaining time for the commit; the rest is for agreeing on whether all engines have committed.
COMMIT_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class TimeBudget:
    """The deadlines of one attempt: every share of `sync_timeout_s` is taken here."""

    total: Deadline
    transfer: Deadline
    """Ends opening lanes, receiving and sending."""
    join: Deadline
    """Ends joining the lanes' groups."""

    @classmethod
    def start(cls, timeout_s: float) -> "TimeBudget":
        """Return the deadlines of an attempt that begins now."""
        transfer_s = timeout_s * TRANSFER_SHARE
        return cls(Deadline(timeout_s), Deadline(transfer_s), Deadline(transfer_s * JOIN_SHARE))

    @property
    def failure_report_s(self) -> float:
        """Seconds that engines have to report why they failed, after a failure here."""
        return self.total.timeout_s * FAILURE_REPORT_SHARE

    def commit(self) -> Deadline:
        """Return the deadline of a commit that begins now."""
        return Deadline(max(self.total.left_s() * COMMIT_SHARE, 0.1))


class SyncSession:
    """One attempt of a sync, on one trainer rank; rank 0 also directs the engines.

        session = SyncSession(version, options, topic="sync/0/3", ...)
        report = session.run()

    The steps, in order: agree on what is sent, open lanes, receive (engines) and send (trainers), agree that all have
    the weights, commit (engines switch to them), agree that all have committed, finalize (engines release what they
    generated meanwhile). A failure before the last agreement aborts the attempt on every engine and raises the same
    `SyncError` on every rank.
    """

    def __init__(
        self,
        version: int,
        options: SyncOptions,
        *,
        served_version: int,
        topic: str,
        source: WeightSource,
        pool: Pool,
        agreement: Agreement,
        lanes: Lanes,
        config: RolloutConfig,
        rank: int,
    ) -> None:
        self._version = version
        self._options = options
        self._served_version = served_version
        self._topic = topic
        self._source = source
        self._pool = pool
        self._agreement = agreement
        self._lanes = lanes
        self._config = config
        self._rank = rank
        # The engines that this rank sends requests to.
        self._engines = range(pool.client.engines if rank == 0 else 0)
        self._receiving: dict[int, Future[Reply]] = {}
        self._timer = PhaseTimer()
        self.committed = False
        """Whether all ranks have agreed that every engine has committed."""

    @property
    def _alone(self) -> bool:
        """Whether one trainer syncs one engine, which then commits by itself: its reply is the only vote."""
        return self._pool.client.engines == 1 and self._config.trainers == 1

    def run(self) -> SyncReport:
        """Make the attempt. Collective over the trainer ranks.

        Raises `ValueError` where ranks disagree or the version does not grow, and `SyncError` on failure.
        """
        with self._timer("plan"):
            self._agree_to_start()
        try:
            workers = self._carry_out()
        except SyncError:
            raise
        except BaseException as error:
            # Else the engines would hold back their outputs for ever.
            self._leave_early(error)
            raise
        assert self._lanes.plan is not None
        report = SyncReport.of(self._version, self._lanes.plan.manifest.nbytes, self._timer, workers)
        self._pool.metrics.synced(report)
        return report

    def _agree_to_start(self) -> None:
        """Make sure that all ranks are about to send the same: a rank with another plan would hang the others."""
        options = self._options
        current, change = self._look_at_weights()
        kind = "self-test" if options.unchanged else f"{options.mode}, verify {options.verify}"
        weights = f"weights {f'that changed: {change}' if change else 'as before'}{self._source.settings}"
        call = f"version {self._version} after {self._served_version}, {kind}, {weights}"
        deadline = Deadline(self._config.trainer_timeout_s)
        verdict = self._agreement.decide(start_topic(self._topic), call, unanimous, deadline=deadline)
        if verdict.late_rank is not None:
            raise SyncError(
                f"sync of version {self._version} did not start: {verdict.error} (trainer_timeout_s)",
                failures=[Failure(text=verdict.error, phase="agree")],
            )
        if verdict.error:
            raise ValueError(verdict.error)
        self._source.check_unchanged(current)
        if self._version <= self._served_version and not options.unchanged:
            raise ValueError(f"version must grow: {self._version} after {self._served_version}")
        self._lanes.exchange_statements(self._topic, deadline=deadline)

    def _look_at_weights(self) -> tuple[Manifest | None, str | None]:
        """Return the manifest of the weights, and how they have changed. What is wrong with them is raised later.

        The other ranks hear of it first: they would wait for this one.
        """
        try:
            current = self._source.peek_manifest()
        except ValueError as error:
            return None, str(error)
        return current, self._source.change(current)

    def _carry_out(self) -> list[WorkerReport]:
        """Transfer the weights, then commit and finalize, or abort and raise the same `SyncError` on every rank."""
        budget = TimeBudget.start(self._config.sync_timeout_s)
        workers: list[WorkerReport] = []
        error: Exception | None = None
        try:
            workers = self._transfer(budget)
        except Exception as caught:
            error = caught
        with self._timer("control"):
            outcome = self._agree("sent", self._transfer_outcome(error, budget), budget)
            if not outcome.failures and not self._alone:
                outcome = self._agree("committed", self._commit(budget.commit()), budget)
            if outcome.failures:
                self._abort(outcome)
                message = f"sync of version {self._version} failed: {outcome.message}"
                raise SyncError(message, failures=outcome.failures) from error
            self.committed = True
            self._finalize()
        return workers

    def _transfer(self, budget: TimeBudget) -> list[WorkerReport]:
        """Open lanes, let the engines receive, and send. Returns the workers' reports on rank 0."""
        with self._timer("plan"):
            self._lanes.open(self._topic, join_deadline=budget.join, deadline=budget.transfer)
            if self._options.verify != "none":
                self._lanes.compare_replicas(self._topic, deadline=budget.transfer)
        error = self._receive(budget.transfer)
        # A rank that has failed sends all the same: the others gather shards with it and would wait for it.
        for verifying in (False, True)[: 2 if self._options.verify == "full" else 1]:
            checksums = self._options.verify != "none" and not verifying
            sent = self._lanes.send(deadline=budget.transfer, timer=self._timer, checksums=checksums)
            error = error or sent
        if error is not None:
            raise error
        with self._timer("control"):
            replies = collect(self._receiving, deadline=budget.transfer, spin=True)
        return [worker for reply in replies for worker in expect(reply, Received).workers]

    def _receive(self, deadline: Deadline) -> Exception | None:
        """Rank 0: let every engine receive. An error is returned, because the ranks must send before they raise."""
        plan, close_groups = self._lanes.plan, self._lanes.group_closer()
        assert plan is not None
        size = self._config.tensor_parallel_size

        def close_if_failed(reply: "Future[Reply]") -> None:
            # A broadcast to a worker that gave up would last until the deadline; closing the groups ends it.
            if reply.exception():
                close_groups()

        try:
            for engine in self._engines:
                workers = range(engine * size, (engine + 1) * size)
                request = Receive(
                    version=self._version,
                    digests=[digest_of(plan.lanes_of(worker)) for worker in workers],
                    first_rank=1 + engine * size,
                    options=self._options,
                    alone=self._alone,
                    timeout_s=deadline.left_s(),
                )
                self._receiving[engine] = self._pool.client.request(engine, request)
                self._receiving[engine].add_done_callback(close_if_failed)
        except Exception as error:
            return error
        return None

    def _transfer_outcome(self, error: Exception | None, budget: TimeBudget) -> StepOutcome:
        """Return what failed in the transfer: the engines' own failures if there are any, else this rank's error."""
        if error is None:
            return StepOutcome()
        wait(self._receiving.values(), timeout=budget.failure_report_s)
        try:
            collect({engine: reply for engine, reply in self._receiving.items() if reply.done()})
        except EngineError as engine_error:
            return StepOutcome.of_error(engine_error, phase="receive")
        own = StepOutcome.of_error(error, phase="send")
        silent = [engine for engine, reply in self._receiving.items() if not reply.done()]
        text = f"no answer (sync_timeout_s is {budget.total.timeout_s:g})"
        failures = [Failure(text=text, engine=engine, phase="receive") for engine in silent]
        return StepOutcome((*failures, *own.failures), "\n".join([*map(str, failures), own.message]))

    def _commit(self, deadline: Deadline) -> StepOutcome:
        """Rank 0: let every engine switch to the version."""
        if not self._engines:
            return StepOutcome()
        try:
            self._pool.client.request_each(Commit(self._version, deadline.left_s()), deadline=deadline)
        except EngineError as error:
            return StepOutcome.of_error(error, phase="commit")
        return StepOutcome()

    def _finalize(self) -> None:
        """Rank 0: let every engine release the outputs of the new version. Does not wait."""
        self._send_each(Finalize())

    def _abort(self, outcome: StepOutcome) -> None:
        """Leave the lanes, and let every engine abort the attempt. Does not wait."""
        self._pool.metrics.failed()
        self._lanes.close()
        self._send_each(AbortSync(outcome.message))

    def _leave_early(self, error: BaseException) -> None:
        """Finalize the attempt on the engines if it was committed, else abort it: this rank ends (Ctrl-C or a bug)."""
        if self.committed:
            self._finalize()
            return
        try:
            self._lanes.close()
        finally:
            self._send_each(AbortSync(f"trainer rank {self._rank} gave it up: {type(error).__name__}"))

    def _send_each(self, request: Request) -> None:
        for engine in self._engines:
            self._pool.client.request(engine, request)

    def _agree(self, step: str, outcome: StepOutcome, budget: TimeBudget) -> StepOutcome:
        return agree_on(self._agreement, f"{self._topic}/{step}", outcome, deadline=budget.total)


def start_topic(topic: str) -> str:
    """Return the topic of the first agreement of the attempt `topic`."""
    return f"{topic}/plan"
