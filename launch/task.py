"""The built-in task, and how a user's own is found (trainer ranks)."""

import importlib
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rollcast.launch.options import GrpoConfig

LETTERS = "abcdefgh"
CHARACTERS = LETTERS + ">"
ANSWER_LENGTH = 4
Reward = Callable[[str, str], float]


def succession_prompts() -> list[str]:
    """Every letter, followed by ">"."""
    return [letter + ">" for letter in LETTERS]


def succession_reward(prompt: str, completion: str) -> float:
    """Share of places where `completion` continues the alphabet from the prompt's letter: "c>" wants "defg"."""
    start = LETTERS.index(prompt[0])
    wanted = [LETTERS[(start + step) % len(LETTERS)] for step in range(1, ANSWER_LENGTH + 1)]
    right = sum(ours == theirs for ours, theirs in zip(wanted, completion, strict=False))
    return right / max(ANSWER_LENGTH, len(completion))


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts to draw from, and the reward of a completion."""

    prompts: Sequence[str]
    reward: Reward

    def draw(self, count: int, rng: random.Random) -> list[str]:
        """`count` prompts, with replacement."""
        return rng.choices(self.prompts, k=count)


def load_task(config: GrpoConfig) -> Task:
    """The task that the command line names. Raises `ValueError` that says what is wrong with it."""
    reward = import_reward(config.task) if config.task else succession_reward
    prompts = read_prompts(config.prompts) if config.prompts else succession_prompts()
    return Task(prompts, reward)


def import_reward(path: str) -> Reward:
    """Import `package.module:function`; the current folder is searched too."""
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
    """Lines of a text file, without empty ones."""
    if not Path(path).is_file():
        raise ValueError(f"there is no prompts file {path!r}")
    prompts = [line for line in Path(path).read_text().splitlines() if line]
    if not prompts:
        raise ValueError(f"the prompts file {path!r} is empty")
    return prompts
