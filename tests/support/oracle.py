"""What rollcast is compared with: transformers' own log-probabilities and greedy tokens; and an error as text."""

from collections.abc import Callable
from typing import Any

import torch

from rollcast.rollout import Completion


def logprobs(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probability of each token behind the prompt, by one forward of the model's own."""
    every = torch.tensor([prompt + tokens])
    with torch.no_grad():
        result = model(input_ids=every).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return result.gather(1, every[0, len(prompt) :, None])[:, 0]


def distances(model: Any, prompt: list[int], sample: Completion) -> torch.Tensor:
    """Distance of the engine's log-probabilities from the model's own, token by token."""
    return (logprobs(model, prompt, sample.token_ids) - torch.tensor(sample.logprobs)).abs()


def greedy_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by full forward passes of transformers: no cache, no sampler."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens], device=model.device)).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def error_text(call: Callable[[], Any]) -> str:
    """Kind and text of the error that a call raises; "nothing" if it raises none."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
