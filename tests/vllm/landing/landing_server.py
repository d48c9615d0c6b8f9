"""Lands weights in vLLM's models without an engine, for tests (a plain process).

landing_server.py FOLDER FD      (reads one job a line from standard input, writes one row each to FD, both JSON)

vLLM's model, built and loaded by vLLM, is what an engine's worker has. The layout of CPU weights is the
environment's.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

os.environ |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}

import architecture_matrix
import lora_matrix
import mistakes
import parts
import shard_matrix
import torch
import torchvision_stub  # noqa: F401  (before vLLM)
from architectures import MOE, build
from loaded_models import LoadedModels
from odd_loaders import OddLoaders
from odd_tensors import OddTensors
from vllm.model_executor.models import registry

from rollcast.rollout.landing.__main__ import main as landing_command
from rollcast.rollout.landing.vllm_reload import choose_cpu_layout

FOLDER = Path(sys.argv[1])


def main() -> None:
    # What vLLM's CPU worker does: there is no accelerator whose cache could be emptied.
    torch.accelerator.empty_cache = lambda: None
    choose_cpu_layout()
    # vLLM looks at each new model class in another process, to keep this one off the GPU: 10 s each.
    registry._run_in_subprocess = lambda look: look()
    answers = os.fdopen(int(sys.argv[2]), "w")
    for line in sys.stdin:
        job, arguments = json.loads(line)
        try:
            row = JOBS[job](**arguments)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(row) + "\n")
        answers.flush()


@cache
def models(**settings: Any) -> LoadedModels:
    """vLLM's models of this process. The first must have experts: else vLLM makes no expert parallel group."""
    folder = FOLDER / "experts"
    if not folder.exists():
        build(MOE, seed=0).save_pretrained(folder)
    return LoadedModels(folder, dtype="float32", max_model_len=64, **settings)


@cache
def odd_loaders() -> OddLoaders:
    """One model for all odd loaders."""
    return OddLoaders(models(), FOLDER / "odd")


def architecture(case: str) -> dict[str, Any]:
    return architecture_matrix.compare(models(), case, FOLDER / "architectures")


def shards(case: str, trainers: list[int]) -> dict[str, Any]:
    return shard_matrix.compare(models(), case, FOLDER / "shards", trainers)


def adapter(case: str) -> dict[str, Any]:
    models()
    return lora_matrix.compare(models(**lora_matrix.SETTINGS), case, FOLDER / "adapters" / case)


def command(arguments: list[str]) -> dict[str, Any]:
    """`python -m rollcast.rollout.landing` with these arguments."""
    models()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = landing_command(arguments)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def derived(case: str) -> dict[str, Any]:
    return OddTensors(models(), FOLDER / "derived").lands(case)


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "architecture": architecture,
    "adapter": adapter,
    "shards": shards,
    "command": command,
    "mistake": lambda case: mistakes.refusal(models(), case, FOLDER / "mistakes" / case),
    "parts": lambda case: parts.CASES[case](models(), FOLDER / "parts" / case),
    "derived": derived,
    "lands": lambda case: odd_loaders().lands(case),
    "refused": lambda case, parameter: odd_loaders().refused(case, parameter),
    "reload": lambda: odd_loaders().reloaded(),
}


if __name__ == "__main__":
    main()
