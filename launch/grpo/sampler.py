"""Generation and rewards of one trainer rank's share of each batch (trainer ranks)."""

import random
import threading
import time
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rollcast.launch.grpo.options import GrpoConfig
from rollcast.launch.grpo.policy import Sample, group_advantages
from rollcast.launch.grpo.task import Task
from rollcast.rollout import Completion, Pool, Sampling


@dataclass(frozen=True, slots=True)
class Rollout:
    """A trainer rank's share of a batch."""

    samples: list[Sample]
    reward: float
    """Mean over the samples."""
    seconds: float
    """Time of generation."""

    @property
    def oldest_version(self) -> int:
        """Policy version of the oldest token."""
        return min(sample.oldest_version for sample in self.samples)

    @property
    def tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)


class Sampler:
    """Generates a trainer rank's share of every batch, from any thread.

    A batch has the same prompts whenever it is generated, and the share of each rank is another part of them.
    """

    def __init__(
        self,
        config: GrpoConfig,
        pool: Pool,
        *,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        trainer_rank: int,
    ) -> None:
        self._share = slice(trainer_rank, None, config.trainers)
        self._prompts_per_step = config.prompts_per_step
        self._sampling = Sampling(
            n=config.samples_per_prompt, max_tokens=config.max_tokens, temperature=config.temperature
        )
        self._pool = pool
        self._task = task
        self._tokenizer = tokenizer
        self._rng = random.Random(config.seed)
        self._drawn: list[list[str]] = []
        # Batches that are generated at the same time draw in their order, and call the user's reward in turns.
        self._turn = threading.Lock()

    def generate(self, batch: int) -> Rollout:
        """Generate, reward and compare completions of this rank's prompts of the batch. Not collective."""
        start = time.perf_counter()
        with self._turn:
            texts = self._draw(batch)[self._share]
            prompts = [self._tokenizer.encode(text) for text in texts]
        groups = self._pool.generate(prompts, self._sampling)
        seconds = time.perf_counter() - start
        samples: list[Sample] = []
        rewards: list[float] = []
        for text, prompt, group in zip(texts, prompts, groups, strict=True):
            group_rewards = self._rewards(text, group)
            rewards += group_rewards
            samples += [
                Sample(
                    prompt,
                    completion.token_ids,
                    completion.logprobs,
                    advantage,
                    completion.versions[0],
                    completion.engine,
                )
                for completion, advantage in zip(group, group_advantages(group_rewards), strict=True)
            ]
        return Rollout(samples, sum(rewards) / len(rewards), seconds)

    def _draw(self, batch: int) -> list[str]:
        while len(self._drawn) <= batch:
            self._drawn.append(self._task.draw(self._prompts_per_step, self._rng))
        return self._drawn[batch]

    def _rewards(self, prompt: str, group: list[Completion]) -> list[float]:
        with self._turn:
            return [self._task.reward(prompt, self._text(completion.token_ids)) for completion in group]

    def _text(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
