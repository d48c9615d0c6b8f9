"""GRPO, group relative policy optimization (DeepSeekMath, arXiv 2402.03300), written out (trainer ranks)."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollcast.comm import SyncReport
from rollcast.launch.errors import AgreementError
from rollcast.launch.options import GrpoConfig
from rollcast.launch.parallel import Trainers
from rollcast.launch.policy import (
    Batch,
    Sample,
    clipped_loss,
    group_advantages,
    kl_penalty,
    make_batch,
    max_logprob_diff,
    token_logprobs,
)
from rollcast.launch.report import RunReport, StepRecord
from rollcast.launch.task import Task
from rollcast.rollout import Job, Sampling

# vLLM's attention multiplies in TF32 on GPUs.
FLOAT32_TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}


@dataclass(frozen=True, slots=True)
class Rollout:
    """What the engines generated for one trainer rank in one step."""

    samples: list[Sample]
    reward: float
    """Mean over the samples of all trainers."""
    oldest_version: int

    @property
    def tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)


class Grpo:
    """One trainer rank's part of the loop.

    for step in range(steps):       # what `run` does
        rollout -> agreement with the engines -> update -> sync
    """

    def __init__(self, config: GrpoConfig, job: Job, *, task: Task, report: RunReport) -> None:
        self.config = config
        self.pool = job.pool
        self.report = report
        self.dtype = job.config.torch_dtype()
        self.tolerance = config.logprob_tolerance
        if self.tolerance is None:
            bound = FLOAT32_TOLERANCE[job.config.resolved_device()]
            self.tolerance = bound if self.dtype == torch.float32 else math.inf
        self.task = task
        self.rng = random.Random(config.seed)
        self.trainers = Trainers(rank=job.trainer_rank, size=config.trainers, device=job.config.resolved_device())
        self.tokenizer = AutoTokenizer.from_pretrained(job.config.model)
        self.pad_id = self.tokenizer.pad_token_id or 0
        self.reference = self._load(job.config.model).requires_grad_(False) if config.kl else None
        self.model = self.trainers.share(self._load(job.config.model), config.parallel)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, start_factor=1.0, end_factor=0.1, total_iters=config.steps
        )
        self.broadcaster = job.broadcaster(self.model)

    def run(self) -> None:
        """All steps, then one more rollout to see what the last sync brought."""
        if self.config.self_test:
            self.broadcaster.self_test()
        for step in range(self.config.steps):
            self.report.add(self.step(step))
        rollout = self.generate()
        self.report.final = {
            "reward": rollout.reward,
            "logprob_max_diff": self.agreement(rollout.samples),
            "policy_version": self.broadcaster.version,
        }
        self.trainers.close()

    def step(self, step: int) -> StepRecord:
        """One step of all trainers together. Collective."""
        with self.report.phase("generate"):
            rollout = self.generate()
        with self.report.phase("agree"):
            difference = self.agreement(rollout.samples)
        with self.report.phase("train"):
            loss = self.update(rollout.samples)
        behind = self.broadcaster.version - rollout.oldest_version
        with self.report.phase("sync"):
            sync = self.sync(version=self.broadcaster.version + 1)
        tokens = round(self.trainers.mean(rollout.tokens) * self.trainers.size)
        return StepRecord(
            step=step,
            reward=rollout.reward,
            logprob_max_diff=difference,
            staleness_max=round(self.trainers.max(behind)),
            policy_version=self.broadcaster.version,
            tokens=tokens,
            tokens_per_s=tokens / self.report.phase_s["generate"],
            loss=self.trainers.mean(loss),
            phase_s=dict(self.report.phase_s),
            sync=sync.to_dict(),
        )

    def generate(self) -> Rollout:
        """Completions of this rank's share of the step's prompts, rewarded and compared within their groups."""
        texts = self.task.draw(self.config.prompts_per_step, self.rng)[self.trainers.rank :: self.trainers.size]
        prompts = [self.tokenizer.encode(text) for text in texts]
        sampling = Sampling(
            n=self.config.samples_per_prompt,
            max_tokens=self.config.max_tokens,
            temperature=self.config.temperature,
        )
        groups = self.pool.generate(prompts, sampling)
        samples: list[Sample] = []
        rewards: list[float] = []
        for text, prompt, group in zip(texts, prompts, groups, strict=True):
            earned = [self.task.reward(text, self._text(completion.token_ids)) for completion in group]
            rewards += earned
            samples += [
                Sample(prompt, completion.token_ids, completion.logprobs, advantage)
                for completion, advantage in zip(group, group_advantages(earned), strict=True)
            ]
        oldest = min(completion.versions[0] for group in groups for completion in group)
        return Rollout(samples, self.trainers.mean(sum(rewards) / len(rewards)), oldest)

    @torch.no_grad()
    def agreement(self, samples: list[Sample]) -> float:
        """Largest difference between the engines' log-probability of a sampled token and this policy's own.

        Raises `AgreementError` on all trainers when it is more than the tolerance. Collective.
        """
        differences = [
            max_logprob_diff(self._logprobs(self.model, batch)[0], batch) for batch in self._minibatches(samples)
        ]
        # Not a number agrees with nothing, and Python's max would lose it.
        difference = self.trainers.max(max(value if value == value else math.inf for value in differences))
        assert self.tolerance is not None
        if not difference <= self.tolerance or difference == math.inf:
            raise AgreementError(
                f"engine and trainer log-probabilities differ by {difference:.2e}, more than {self.tolerance:.0e}: "
                f"the engines' weights are not the trainer's version {self.broadcaster.version}"
            )
        return difference

    def update(self, samples: list[Sample]) -> float:
        """Clipped policy gradient over the samples, `epochs` times. Returns the mean loss. Collective."""
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
        """Push the weights into the engines. Collective."""
        return self.broadcaster.sync(version=version)

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Mean over the sampled tokens of all trainers, up to the averaging of gradients over trainers."""
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

    def _text(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def _load(self, folder: str) -> nn.Module:
        model = cast(nn.Module, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        return model.to(self.trainers.device)
