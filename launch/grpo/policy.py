"""The policy-gradient arithmetic of GRPO, on padded batches (trainer ranks).

Shapes: B sequences, L tokens (prompt and completion, padded on the right). Log-probabilities and masks are
[B, L - 1]: position t belongs to token t + 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion, with the engine's log-probabilities."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    advantage: float
    oldest_version: int
    """Policy version that sampled its first token."""
    engine: int
    """Engine that sampled it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples as tensors."""

    input_ids: torch.Tensor
    """int64 [B, L]."""
    attention_mask: torch.Tensor
    """int64 [B, L]: 1 for tokens, 0 for padding."""
    completion_mask: torch.Tensor
    """float32 [B, L - 1]: 1 where token t + 1 was sampled."""
    rollout_logprobs: torch.Tensor
    """float32 [B, L - 1]: the engine's log-probability of token t + 1; 0 outside the completion."""
    advantages: torch.Tensor
    """float32 [B, 1]."""
    oldest_versions: torch.Tensor
    """int64 [B, 1]."""
    engines: torch.Tensor
    """int64 [B, 1]."""


def group_advantages(rewards: Sequence[float], *, eps: float = 1e-4) -> list[float]:
    """Return rewards relative to the group of one prompt: (r - mean) / (std + eps), as in DeepSeekMath, section 4.1."""
    values = torch.tensor(rewards, dtype=torch.float32)
    return ((values - values.mean()) / (values.std(correction=0) + eps)).tolist()


def make_batch(samples: Sequence[Sample], *, pad_id: int, device: torch.device) -> Batch:
    """Pad samples on the right and stack them."""
    lengths = [len(sample.prompt_ids) + len(sample.token_ids) for sample in samples]
    shape = len(samples), max(lengths)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention = torch.zeros(shape, dtype=torch.int64)
    mask, logprobs = torch.zeros(shape[0], shape[1] - 1), torch.zeros(shape[0], shape[1] - 1)
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        completion = slice(len(sample.prompt_ids) - 1, length - 1)
        input_ids[row, :length] = torch.tensor([*sample.prompt_ids, *sample.token_ids])
        attention[row, :length] = 1
        mask[row, completion] = 1.0
        logprobs[row, completion] = torch.tensor(sample.logprobs)
    advantages = torch.tensor([[sample.advantage] for sample in samples])
    oldest = torch.tensor([[sample.oldest_version] for sample in samples])
    engines = torch.tensor([[sample.engine] for sample in samples])
    return Batch(*(tensor.to(device) for tensor in (input_ids, attention, mask, logprobs, advantages, oldest, engines)))


def token_logprobs(model: nn.Module, batch: Batch, *, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each next token, and the entropy, at the temperature; float32 [B, L - 1]."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logprobs = (logits[:, :-1].float() / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1), entropy


def clipped_loss(logprobs: torch.Tensor, batch: Batch, *, clip: float) -> torch.Tensor:
    """Return PPO's clipped surrogate against the engine's log-probabilities; float32 [B, L - 1], 0 outside the mask."""
    ratio = (logprobs - batch.rollout_logprobs).exp()
    surrogate = torch.minimum(ratio * batch.advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * batch.advantages)
    return torch.where(batch.completion_mask > 0, -surrogate, 0.0)


def kl_penalty(logprobs: torch.Tensor, reference: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return Schulman's k3 estimate of KL(policy || reference) at each sampled token; float32 [B, L - 1]."""
    delta = reference - logprobs
    return torch.where(batch.completion_mask > 0, delta.exp() - delta - 1.0, 0.0)


def logprob_diffs(logprobs: torch.Tensor, batch: Batch, *, version: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return |trainer's - engine's log-probability| of sampled tokens, and their engines; float32, int64 [tokens].

    Only samples whose tokens are all of `version`, the trainer's, are compared. NaN becomes infinity.
    """
    compared = (batch.completion_mask > 0) & (batch.oldest_versions >= version)
    differences = (logprobs - batch.rollout_logprobs).abs()[compared].nan_to_num(nan=math.inf, posinf=math.inf)
    return differences, batch.engines.expand_as(compared)[compared]
