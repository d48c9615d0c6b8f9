"""Settings of the GRPO job and its command line; the dataclass is the only place of defaults (every rank)."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

DESCRIPTION = """Train a language model with GRPO: trainer ranks learn, the other ranks generate with vLLM, and the
new weights go from one to the other in memory after every step.

  torchrun --standalone --nproc-per-node 2 -m rollcast.launch.grpo
  torchrun --standalone --nproc-per-node 4 -m rollcast.launch.grpo --trainers 2 --steps 10
  torchrun --standalone --nproc-per-node 4 -m rollcast.launch.grpo --trainers 2 --tensor-parallel-size 2 \\
      --model ./Qwen3-0.6B --task my_package.rewards:is_correct --prompts prompts.txt
"""


AT_LEAST_ONE = (
    "trainers",
    "tensor_parallel_size",
    "steps",
    "prompts_per_step",
    "samples_per_prompt",
    "max_tokens",
    "epochs",
    "minibatches",
    "bucket_mib",
)
POSITIVE = ("temperature", "learning_rate", "clip", "max_grad_norm", "sync_timeout_s")


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """Settings of `rollcast.launch.grpo`. The help texts are in `HELP`."""

    model: str | None = None
    task: str | None = None
    prompts: str | None = None
    trainers: int = 1
    tensor_parallel_size: int = 1
    parallel: str = "fsdp2"
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    steps: int = 40
    prompts_per_step: int = 32
    samples_per_prompt: int = 16
    max_tokens: int = 4
    temperature: float = 1.0
    learning_rate: float = 2e-3
    clip: float = 0.2
    entropy: float = 0.05
    kl: float = 0.0
    epochs: int = 1
    minibatches: int = 8
    max_grad_norm: float = 1.0
    seed: int = 0
    deterministic: bool = False
    mode: str = "on_policy"
    max_staleness: int = 2
    stale: str = "complete"
    pause_mode: str = "keep"
    bucket_mib: int = 256
    sync_timeout_s: float = 60.0
    verify: str = "none"
    self_test: bool = True
    logprob_tolerance: float | None = None
    enforce_eager: bool | None = None
    runs: str = "runs"

    def __post_init__(self) -> None:
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.prompts_per_step % self.trainers:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} cannot be split evenly over {self.trainers} trainers"
            )
        if (samples := self.prompts_per_step // self.trainers * self.samples_per_prompt) % self.minibatches:
            raise ValueError(
                f"{samples} samples of a trainer cannot be split evenly into {self.minibatches} minibatches"
            )
        if self.samples_per_prompt < 2:
            raise ValueError("samples_per_prompt must be at least 2: GRPO compares samples of one prompt")
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness must be at least 0, got {self.max_staleness}")
        if self.deterministic and self.mode != "on_policy":
            raise ValueError(f"deterministic needs mode on_policy: in mode {self.mode}, results depend on timing")
        if self.mode == "async" and self.pause_mode == "abort":
            raise ValueError("pause_mode abort would cut off what mode async generates during a sync: keep or wait")


HELP = {
    "model": "Hugging Face folder; without it, a tiny Qwen3-shaped model with random weights",
    "task": "your reward as package.module:function, called with (prompt, completion), returns a float; "
    "without it, the built-in task",
    "prompts": "text file, one prompt a line; without it, the built-in task's prompts",
    "trainers": "ranks that train; the others form engines",
    "tensor_parallel_size": "ranks of one engine",
    "parallel": "how several trainers share the model",
    "device": "where everything runs; auto: CUDA if there is a GPU",
    "dtype": "of the engines (trainers keep float32); auto: what config.json says",
    "max_model_len": "longest prompt plus completion in tokens; default: what config.json says",
    "steps": "optimizer steps; each ends with a sync",
    "prompts_per_step": "prompts drawn for a step, over all trainers",
    "samples_per_prompt": "completions of each prompt: the group that rewards are compared in",
    "max_tokens": "longest completion",
    "temperature": "of sampling",
    "learning_rate": "of AdamW at the start; falls to a tenth of it over the steps",
    "clip": "bound of the policy ratio: 1 - clip to 1 + clip",
    "entropy": "weight of the entropy bonus; 0: none",
    "kl": "weight of the KL penalty towards the initial policy; 0: none",
    "epochs": "passes over the samples of a step",
    "minibatches": "optimizer steps in a pass",
    "max_grad_norm": "gradients are scaled down to this norm",
    "seed": "of the initial weights, the prompts and the engines",
    "deterministic": "the same seed gives the same tokens and the same curve; slower, and for mode on_policy",
    "mode": "what overlaps; on_policy: nothing, one_step_off: a batch is generated while the one before is trained on, "
    "async: generation goes on during training and syncs",
    "max_staleness": "mode async: most versions that a sample may be older than the policy that it trains",
    "stale": "mode async, what becomes of a batch that is late; complete: training waits for it before it is too old, "
    "drop: training goes on without it",
    "pause_mode": "what a sync does to requests in flight",
    "bucket_mib": "MiB of one broadcast",
    "sync_timeout_s": "a sync that takes longer than this many seconds fails",
    "verify": "how a sync makes sure that what arrived is what was sent; checksum: hashes made on both sides, "
    "full: everything is sent again and compared with what is in the engines' memory",
    "self_test": "first send the engines the weights that they have loaded: not a byte may change",
    "logprob_tolerance": "stop if an engine's log-probabilities differ from the trainer's by more, on average; "
    "default: 1e-4 in float32 (1e-3 on GPUs), no bound otherwise",
    "enforce_eager": "no torch.compile and CUDA graphs in the engines; default: only on CPU",
    "runs": "folder for the run's folder",
}
CHOICES = {
    "parallel": ("fsdp2", "ddp"),
    "device": ("auto", "cpu", "cuda"),
    "mode": ("on_policy", "one_step_off", "async"),
    "stale": ("complete", "drop"),
    "verify": ("none", "checksum", "full"),
}


def parse(argv: Sequence[str] | None = None) -> GrpoConfig:
    """Read the command line. Exits with a message on values that cannot work."""
    parser = argparse.ArgumentParser(
        prog="rollcast.launch.grpo",
        usage="torchrun --nproc-per-node N -m rollcast.launch.grpo [options]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in fields(GrpoConfig):
        _add(parser, field.name, field.default)
    options = vars(parser.parse_args(argv))
    try:
        return GrpoConfig(**options)
    except ValueError as error:
        parser.error(str(error))


def _add(parser: argparse.ArgumentParser, name: str, default: Any) -> None:
    flag = "--" + name.replace("_", "-")
    if name in ("deterministic", "enforce_eager", "self_test"):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=HELP[name])
        return
    kind = {"max_model_len": int, "logprob_tolerance": float}.get(name, str if default is None else type(default))
    suffix = "" if default is None else f" (default: {default})"
    parser.add_argument(flag, type=kind, default=default, choices=CHOICES.get(name), help=HELP[name] + suffix)
