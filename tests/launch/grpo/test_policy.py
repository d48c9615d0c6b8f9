"""GRPO's arithmetic on padded batches, against plain sums over samples that are never padded."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollcast.launch.grpo.policy import (
    Batch,
    Sample,
    clipped_loss,
    group_advantages,
    kl_penalty,
    logprob_diffs,
    make_batch,
    token_logprobs,
)

CPU = torch.device("cpu")
VOCABULARY, PAD = 19, 0
CLIP = 0.2


@dataclass
class Token:
    """One sampled token as the oracle sees it."""

    row: int
    position: int
    """In the completion."""
    logprob: torch.Tensor
    entropy: torch.Tensor


def tiny_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        initializer_range=0.3,
        dtype=torch.float32,
    )
    model: nn.Module = Qwen3ForCausalLM(config)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model(0)


@pytest.fixture(scope="module")
def samples(model: nn.Module) -> list[Sample]:
    """Prompts and completions of unequal lengths; engine logprobs near the model's, so that some ratios are clipped."""
    torch.manual_seed(1)
    samples: list[Sample] = []
    for index, (prompt, completion) in enumerate([(1, 1), (3, 5), (6, 2), (2, 8), (5, 3)]):
        ids = torch.randint(1, VOCABULARY, (prompt + completion,)).tolist()
        own = [token.logprob.item() for token in oracle(model, [Sample(ids[:prompt], ids[prompt:], [], 0.0, 0, 0)])]
        noise = (torch.randn(completion) * 0.4).tolist()
        engine = [logprob + offset for logprob, offset in zip(own, noise, strict=True)]
        advantage = (-1.3, 0.7, 2.0, -0.4, 1.1)[index]
        samples.append(Sample(ids[:prompt], ids[prompt:], engine, advantage, index, engine=index % 2))
    return samples


def oracle(model: nn.Module, samples: list[Sample], *, temperature: float = 1.0) -> Iterator[Token]:
    """Every sampled token, from one unpadded forward pass a sample."""
    for row, sample in enumerate(samples):
        ids = [*sample.prompt_ids, *sample.token_ids]
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        for position, token in enumerate(sample.token_ids):
            scaled = logits[len(sample.prompt_ids) + position - 1] / temperature
            probabilities = scaled.exp() / scaled.exp().sum()
            entropy = -(probabilities * probabilities.log()).sum()
            yield Token(row, position, probabilities[token].log(), entropy)


def batch_of(samples: list[Sample]) -> Batch:
    return make_batch(samples, pad_id=PAD, device=CPU)


@pytest.mark.parametrize("rewards", [[0.0, 1.0], [0.25, 0.5, 0.5, 1.0], [-3.0, 7.5, 2.0], [1.0, 1.0, 1.0], [2.0]])
def test_advantages_are_relative_to_the_group(rewards: list[float]) -> None:
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    expected = [(reward - mean) / (deviation + 1e-4) for reward in rewards]
    assert group_advantages(rewards) == pytest.approx(expected, abs=1e-5)


def test_equal_rewards_teach_nothing() -> None:
    assert group_advantages([0.3] * 8) == pytest.approx([0.0] * 8, abs=1e-3)


def test_batch_holds_every_token_once(samples: list[Sample]) -> None:
    batch = batch_of(samples)
    assert batch.input_ids.shape == batch.attention_mask.shape == (5, 10)
    for row, sample in enumerate(samples):
        ids = [*sample.prompt_ids, *sample.token_ids]
        padding = 10 - len(ids)
        assert batch.input_ids[row].tolist() == ids + [PAD] * padding
        assert batch.attention_mask[row].tolist() == [1] * len(ids) + [0] * padding
        prompt, completion = len(sample.prompt_ids), len(sample.token_ids)
        assert batch.completion_mask[row].tolist() == [0] * (prompt - 1) + [1] * completion + [0] * padding
        expected = [0.0] * (prompt - 1) + list(sample.logprobs) + [0.0] * padding
        assert batch.rollout_logprobs[row].tolist() == pytest.approx(expected)
        assert batch.advantages[row].tolist() == pytest.approx([sample.advantage])
    dtypes = {field: getattr(batch, field).dtype for field in ("input_ids", "rollout_logprobs", "advantages")}
    assert dtypes == {"input_ids": torch.int64, "rollout_logprobs": torch.float32, "advantages": torch.float32}


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_logprobs_and_entropy_are_those_of_unpadded_samples(
    model: nn.Module, samples: list[Sample], temperature: float
) -> None:
    with torch.no_grad():
        logprobs, entropy = token_logprobs(model, batch_of(samples), temperature=temperature)
        for token in oracle(model, samples, temperature=temperature):
            column = len(samples[token.row].prompt_ids) - 1 + token.position
            assert logprobs[token.row, column].item() == pytest.approx(token.logprob.item(), abs=1e-5)
            assert entropy[token.row, column].item() == pytest.approx(token.entropy.item(), abs=1e-5)


def test_clipped_loss_and_its_gradient(model: nn.Module, samples: list[Sample]) -> None:
    batch = batch_of(samples)
    loss = clipped_loss(token_logprobs(model, batch, temperature=1.0)[0], batch, clip=CLIP)
    assert loss[batch.completion_mask == 0].abs().max() == 0.0
    expected, kinds = torch.zeros(()), set()
    for token in oracle(model, samples):
        sample = samples[token.row]
        ratio = torch.exp(token.logprob - sample.logprobs[token.position])
        bounded = min(max(ratio.item(), 1 - CLIP), 1 + CLIP)
        gains = ratio * sample.advantage, torch.tensor(bounded * sample.advantage)
        is_clipped = gains[1].item() < gains[0].item()
        kinds.add((is_clipped, sample.advantage > 0))
        expected = expected - (gains[1] if is_clipped else gains[0])
    assert len(kinds) == 4, "the samples must have clipped and free ratios of both signs"
    assert loss.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(gradients(loss.sum(), model), gradients(expected, model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_kl_penalty_and_its_gradient(model: nn.Module, samples: list[Sample]) -> None:
    batch, initial = batch_of(samples), tiny_model(5)
    with torch.no_grad():
        reference = token_logprobs(initial, batch, temperature=1.0)[0]
        theirs = [token.logprob for token in oracle(initial, samples)]
    penalty = kl_penalty(token_logprobs(model, batch, temperature=1.0)[0], reference, batch)
    assert penalty[batch.completion_mask == 0].abs().max() == 0.0
    assert penalty.min() >= 0.0
    expected = torch.zeros(())
    for token, other in zip(oracle(model, samples), theirs, strict=True):
        expected = expected + torch.exp(other - token.logprob) - (other - token.logprob) - 1
    assert penalty.sum().item() == pytest.approx(expected.item(), rel=1e-4)
    for ours, plain in zip(gradients(penalty.sum(), model), gradients(expected, model), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


def test_kl_penalty_of_equal_policies_is_nothing(model: nn.Module, samples: list[Sample]) -> None:
    batch = batch_of(samples)
    with torch.no_grad():
        logprobs = token_logprobs(model, batch, temperature=1.0)[0]
    assert kl_penalty(logprobs, logprobs, batch).abs().max() == 0.0


def test_differences_count_sampled_tokens_only(model: nn.Module, samples: list[Sample]) -> None:
    batch = batch_of(samples)
    with torch.no_grad():
        logprobs = token_logprobs(model, batch, temperature=1.0)[0]
        tokens = list(oracle(model, samples))
    gaps = [abs(token.logprob.item() - samples[token.row].logprobs[token.position]) for token in tokens]
    assert logprob_diffs(logprobs, batch, version=0)[0].tolist() == pytest.approx(gaps, abs=1e-5)
    elsewhere = torch.where(batch.completion_mask == 0, logprobs - 50.0, logprobs)
    assert logprob_diffs(elsewhere, batch, version=0)[0].tolist() == pytest.approx(gaps, abs=1e-5)
    nowhere = torch.full_like(logprobs, math.nan)
    assert logprob_diffs(nowhere, batch, version=0)[0].tolist() == [math.inf] * len(gaps), "it agrees with nothing"


@pytest.mark.parametrize("version", range(6))
def test_differences_leave_out_samples_with_older_tokens(model: nn.Module, samples: list[Sample], version: int) -> None:
    batch = batch_of(samples)
    with torch.no_grad():
        logprobs = token_logprobs(model, batch, temperature=1.0)[0]
        tokens = [token for token in oracle(model, samples) if samples[token.row].oldest_version >= version]
    gaps = [abs(token.logprob.item() - samples[token.row].logprobs[token.position]) for token in tokens]
    differences, engines = logprob_diffs(logprobs, batch, version=version)
    assert differences.tolist() == pytest.approx(gaps, abs=1e-5)
    assert engines.tolist() == [samples[token.row].engine for token in tokens]


def test_padding_never_poisons_the_loss(samples: list[Sample]) -> None:
    batch = batch_of(samples)
    policy = torch.where(batch.completion_mask == 0, -100.0, -1.0)
    assert kl_penalty(policy, torch.full_like(policy, -1.0), batch).sum().isfinite()


def gradients(loss: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    """The gradient of every parameter; the graph is kept, the model's own `.grad` is left alone."""
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, materialize_grads=True))
