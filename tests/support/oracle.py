"""What jobs ask of others than rollcast: transformers' own log-probabilities, and the words of an error."""

from collections.abc import Callable
from typing import Any

import torch

from rollcast.rollout import Completion


def logprobs(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Of each token behind the prompt, by one forward of the model's own."""
    every = torch.tensor([prompt + tokens])
    with torch.no_grad():
        found = model(input_ids=every).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return found.gather(1, every[0, len(prompt) :, None])[:, 0]


def distances(model: Any, prompt: list[int], sample: Completion) -> torch.Tensor:
    """Of the engine's log-probabilities from the model's own, token by token."""
    return (logprobs(model, prompt, sample.token_ids) - torch.tensor(sample.logprobs)).abs()


def said(call: Callable[[], Any]) -> str:
    """The kind and the words of what a call raises."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
