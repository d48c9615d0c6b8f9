"""GRPO, group relative policy optimization (DeepSeekMath, arXiv 2402.03300), written out (trainer ranks)."""

import math
from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollcast.comm import SyncReport
from rollcast.launch.grpo.logprob_check import LogprobGap, check_logprobs
from rollcast.launch.grpo.options import GrpoConfig
from rollcast.launch.grpo.parallel import Trainers
from rollcast.launch.grpo.policy import (
    Batch,
    Sample,
    clipped_loss,
    kl_penalty,
    logprob_diffs,
    make_batch,
    token_logprobs,
)
from rollcast.launch.grpo.report import RunReport, StepRecord
from rollcast.launch.grpo.sampler import Rollout, Sampler
from rollcast.launch.grpo.task import Task
from rollcast.rollout import Job, Mode, async_, on_policy, one_step_off

# vLLM's attention multiplies in TF32 on GPUs: single tokens then differ by up to 0.03, on average by 2e-4 at most.
FLOAT32_TOLERANCE = {"cpu": 1e-4, "cuda": 1e-3}


class Grpo:
    """One trainer rank's part of the loop.

    for step in range(steps):       # the orchestrator overlaps steps as far as the mode allows
        sampler.generate -> train (log-probability check, update) -> finish (sync, record)
    """

    def __init__(self, config: GrpoConfig, job: Job, *, task: Task, report: RunReport) -> None:
        self.config = config
        self.job = job
        self.report = report
        self.dtype = job.config.torch_dtype()
        self.trainers = Trainers(rank=job.trainer_rank, size=config.trainers, device=job.config.resolved_device())
        tokenizer = AutoTokenizer.from_pretrained(job.config.model)
        self.pad_id = tokenizer.pad_token_id or 0
        self.sampler = Sampler(config, job.pool, task=task, tokenizer=tokenizer, trainer_rank=job.trainer_rank)
        self.reference = self._load(job.config.model).requires_grad_(False) if config.kl else None
        self.model = self.trainers.share(self._load(job.config.model), config.parallel)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, start_factor=1.0, end_factor=0.1, total_iters=config.steps
        )
        self.broadcaster = job.broadcaster(self.model)
        self.dropped = 0

    def run(self) -> None:
        """Run all steps, then generate once more to check the last sync. Collective."""
        if self.config.self_test:
            self.broadcaster.self_test()
        outcome = self.job.orchestrator(
            mode_of(self.config),
            generate=self.sampler.generate,
            train=self.train,
            sync=self.finish,
            dropped=self.drop,
            waiting=partial(self.report.phase, "generate"),
        ).run(steps=self.config.steps)
        rollout = self.sampler.generate(outcome.trained + outcome.dropped)
        gap = self.logprob_gap(rollout.samples)
        self.report.final = {
            "reward": self.trainers.mean(rollout.reward),
            "logprob_mean_diff": gap.mean_diff,
            "logprob_max_diff": gap.max_diff,
            "policy_version": self.broadcaster.version,
        }
        self.trainers.close()

    def train(self, rollout: Rollout) -> None:
        """Check the engines' log-probabilities, then update the policy. Collective."""
        with self.report.phase("agree"):
            gap = self.logprob_gap(rollout.samples)
        with self.report.phase("train"):
            loss = self.update(rollout.samples)
        self.trained = rollout, gap, loss

    def drop(self, rollout: Rollout) -> None:
        """Count samples that are not trained on."""
        self.dropped += len(rollout.samples)
        self.job.pool.metrics.stale_drops.inc(len(rollout.samples))

    def finish(self, version: int) -> None:
        """Sync, and record the step. Collective."""
        rollout, gap, loss = self.trained
        behind = self.broadcaster.version - rollout.oldest_version
        with self.report.phase("sync"):
            sync = self.sync(version=version)
        tokens = round(self.trainers.mean(rollout.tokens) * self.trainers.size)
        record = StepRecord(
            step=len(self.report.records),
            reward=self.trainers.mean(rollout.reward),
            logprob_mean_diff=gap.mean_diff,
            logprob_max_diff=gap.max_diff,
            staleness_max=round(self.trainers.max(behind)),
            samples_dropped=self.dropped * self.trainers.size,
            policy_version=version,
            tokens=tokens,
            tokens_per_s=tokens / rollout.seconds,
            loss=self.trainers.mean(loss),
            phase_s=dict(self.report.phase_s),
            sync=sync.to_dict(),
        )
        self.dropped = 0
        self.report.add(record)

    @torch.no_grad()
    def logprob_gap(self, samples: list[Sample]) -> LogprobGap:
        """Compare the engines' log-probabilities of sampled tokens with this policy's. Collective.

        Samples whose tokens are all of this policy's version are compared. Raises `LogprobError` on all trainers if an
        engine differs by more than the tolerance on average.
        """
        version = self.broadcaster.version
        if not self.trainers.max(any(sample.oldest_version >= version for sample in samples)):
            return LogprobGap()
        compared = [
            logprob_diffs(self._logprobs(self.model, batch)[0], batch, version=version)
            for batch in self._minibatches(samples)
        ]
        differences, engines = (torch.cat(parts) for parts in zip(*compared, strict=True))
        return check_logprobs(
            differences,
            engines,
            self.trainers,
            engines=self.job.world.engines,
            tolerance=self._tolerance(),
            version=version,
        )

    def _tolerance(self) -> float:
        """Return the largest average difference of an engine that is accepted."""
        if self.config.logprob_tolerance is not None:
            return self.config.logprob_tolerance
        return FLOAT32_TOLERANCE[self.trainers.device.type] if self.dtype == torch.float32 else math.inf

    def update(self, samples: list[Sample]) -> float:
        """Take clipped policy-gradient steps over the samples, `epochs` times; return the mean loss. Collective."""
        losses: list[float] = []
        for _ in range(self.config.epochs):
            for batch in self._minibatches(samples):
                self.optimizer.zero_grad()
                loss = self._loss(batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
                self.optimizer.step()
                losses.append(loss.item())
        self.schedule.step()
        return sum(losses) / len(losses)

    def sync(self, *, version: int) -> SyncReport:
        """Push the weights to the engines. Collective."""
        return self.broadcaster.sync(version=version)

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Return the loss, such that averaged over trainers its gradient is the mean over all sampled tokens."""
        logprobs, entropy = self._logprobs(self.model, batch)
        loss = clipped_loss(logprobs, batch, clip=self.config.clip)
        loss = loss - self.config.entropy * entropy * batch.completion_mask
        if self.reference is not None:
            with torch.no_grad():
                reference, _ = self._logprobs(self.reference, batch)
            loss = loss + self.config.kl * kl_penalty(logprobs, reference, batch)
        return loss.sum() / self.trainers.mean(batch.completion_mask.sum().item())

    def _logprobs(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.dtype != torch.float32
        with torch.autocast(self.trainers.device.type, dtype=self.dtype if half else None, enabled=half):
            return token_logprobs(model, batch, temperature=self.config.temperature)

    def _minibatches(self, samples: list[Sample]) -> Iterator[Batch]:
        count = self.config.minibatches
        for index in range(count):
            yield make_batch(samples[index::count], pad_id=self.pad_id, device=self.trainers.device)

    def _load(self, folder: str) -> nn.Module:
        model = cast(nn.Module, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        return model.to(self.trainers.device)


def mode_of(config: GrpoConfig) -> Mode:
    """Return the orchestrator's mode of the settings."""
    if config.mode == "async":
        return async_(max_staleness=config.max_staleness, stale=config.stale)
    return {"on_policy": on_policy, "one_step_off": one_step_off}[config.mode]()
