"""The built-in task, and the import of a user's own (trainer ranks)."""

import importlib
import itertools
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rollcast.launch.grpo.options import GrpoConfig

LETTERS = "abcdefgh"
WORD_LENGTH = 4
CHARACTERS = LETTERS + LETTERS.upper() + ">"
Reward = Callable[[str, str], float]


def capital_prompts() -> list[str]:
    """Return every word of `WORD_LENGTH` letters, followed by ">": "cabh>"."""
    return ["".join(word) + ">" for word in itertools.product(LETTERS, repeat=WORD_LENGTH)]


def capital_reward(prompt: str, completion: str) -> float:
    """Return the share of positions with the right capital: "CABH" is right for "cabh>".

    An untrained model earns about 0.05, a constant answer at most 1/8. Extra characters count as wrong.
    """
    expected = prompt.removesuffix(">").upper()
    right = sum(character == other for character, other in zip(expected, completion, strict=False))
    return right / max(len(expected), len(completion))


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts to draw from, and the reward of a completion."""

    prompts: Sequence[str]
    reward: Reward

    def draw(self, count: int, rng: random.Random) -> list[str]:
        """Draw `count` prompts with replacement."""
        return rng.choices(self.prompts, k=count)


def load_task(config: GrpoConfig) -> Task:
    """Load the task that the command line names. Raises `ValueError` if it cannot be used."""
    reward = import_reward(config.task) if config.task else capital_reward
    prompts = read_prompts(config.prompts) if config.prompts else capital_prompts()
    return Task(prompts, reward)


def import_reward(path: str) -> Reward:
    """Import `package.module:function`; the current folder is searched, too."""
    module, colon, function = path.partition(":")
    if not (module and colon and function):
        raise ValueError(f"task {path!r} is not of the form package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        reward = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import task {path!r}: {error}") from error
    if not callable(reward):
        raise ValueError(f"task {path!r} is not a function but {type(reward).__name__}")
    return cast(Reward, reward)


def read_prompts(path: str) -> list[str]:
    """Return the lines of a text file, without empty ones."""
    if not Path(path).is_file():
        raise ValueError(f"there is no prompts file {path!r}")
    prompts = [line for line in Path(path).read_text().splitlines() if line]
    if not prompts:
        raise ValueError(f"the prompts file {path!r} is empty")
    return prompts
