"""The shapes of the jobs that tests share: each is started once a session, for all tests that name its fixture."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters import RANK, adapted
from chats import write_tokenizer
from models import build

import rollcast.rollout as rollcast
from rollcast.launch.grpo.task import CHARACTERS

VOCABULARY = CHARACTERS + "ijklmnopqrstuvwxyzIJKLMNOPQR"
KV_BLOCK_TOKENS = 32
MAX_NUM_SEQS = 4

# What the trainers have.
MODELS: dict[str, Callable[[], Any]] = {
    "untied": lambda: build("untied"),
    "tied": lambda: build("tied"),
    "adapted": lambda: adapted(use_rslora=True, rank_pattern={"down_proj": 3}),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How many ranks of which kind, and what is not as in the other shapes."""

    model: str = "untied"
    """The trainers', of `MODELS`; engines load its base from disk."""
    trainers: int = 1
    engines: int = 1
    tensor_parallel_size: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.trainers + self.engines * self.tensor_parallel_size

    def config(self, folder: Path) -> rollcast.RolloutConfig:
        """Settings of the job; writes what the engines load."""
        build("tied" if self.model == "tied" else "untied").save_pretrained(folder / "model")
        if "openai_port" in self.settings:
            write_tokenizer(folder / "model", characters=VOCABULARY)
        return rollcast.RolloutConfig(
            model=str(folder / "model"),
            trainers=self.trainers,
            tensor_parallel_size=self.tensor_parallel_size,
            enforce_eager=True,
            # Small buckets: many tensors are split.
            bucket_bytes=4096,
            worker_extension_cls="steered_worker.SteeredWorker",
            log_dir=str(folder),
            **self.settings,
        )


OPENAI_FLAGS = ("--served-model-name", "it", "--return-tokens-as-token-ids")

SHAPES = {
    "one_engine": Shape(settings={"cpu_weights": "plain"}),
    "two_engines": Shape(
        engines=2,
        settings={
            "openai_port": 0,
            "openai_flags": OPENAI_FLAGS,
            "max_num_seqs": MAX_NUM_SEQS,
            "engine_args": {"block_size": KV_BLOCK_TOKENS},
        },
    ),
    "two_trainers": Shape(model="tied", trainers=2, tensor_parallel_size=2),
    "lora": Shape(model="adapted", settings={"lora_rank": RANK}),
    "lora_two_versions": Shape(model="adapted", settings={"lora_rank": RANK, "lora_versions": 2}),
    "lora_two_workers": Shape(model="adapted", tensor_parallel_size=2, settings={"lora_rank": RANK}),
}
"""In the order in which tests need them."""
