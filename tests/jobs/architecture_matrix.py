"""Land perturbed weights in vLLM's models and compare with a fresh load, one architecture after the other.

architecture_matrix.py FOLDER NAME...      (a plain process; prints one JSON object a line)

No engine: vLLM's model, built and loaded by vLLM, is what an engine's worker has.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import torch
from architectures import ARCHITECTURES, REFUSED, build, perturb
from safetensors.torch import load_file
from vllm import EngineArgs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.model_loader import get_model

from rollcast.comm import WeightSource
from rollcast.rollout.extension import live_tensors
from rollcast.rollout.landing import DirectLanding, compile_landing
from rollcast.rollout.layout import check_layout


def main() -> None:
    folder = Path(sys.argv[1])
    # What vLLM's CPU worker does: there is no accelerator whose cache could be emptied.
    torch.accelerator.empty_cache = lambda: None
    initialise(folder / "first")
    for name in sys.argv[2:]:
        start = time.monotonic()
        try:
            row = compare(name, folder / name)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": name, "seconds": round(time.monotonic() - start, 2)} | row), flush=True)


def compare(name: str, folder: Path) -> dict[str, Any]:
    config_class, settings = (ARCHITECTURES | REFUSED)[name][:2]
    model = build(config_class, settings, seed=0)
    model.save_pretrained(folder / "base")
    perturb(model)
    model.save_pretrained(folder / "perturbed")
    updated, fresh = load(folder / "base"), load(folder / "perturbed")
    live, expected = live_tensors(updated), live_tensors(fresh)
    stale = [tensor for tensor in live if not torch.equal(live[tensor], expected[tensor])]
    check_layout(updated)
    checkpoint: dict[str, torch.Tensor] = {}
    for file in sorted((folder / "perturbed").glob("*.safetensors")):
        checkpoint |= load_file(file)
    source = WeightSource(checkpoint)
    plan = compile_landing(updated.load_weights, live, source.manifest)
    landing = DirectLanding(plan, live)
    with torch.no_grad():
        for index, (_, tensor) in enumerate(source):
            landing.land(index, tensor)
    return {
        "parameters": len(checkpoint),
        "moves": len(plan.moves),
        "problems": plan.check(live),
        "stale_before": len(stale),
        "different": [tensor for tensor in expected if not torch.equal(live[tensor], expected[tensor])],
    }


def load(folder: Path) -> Any:
    config = engine_config(folder)
    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


def initialise(folder: Path) -> None:
    """vLLM's distributed state for one rank. It makes an expert parallel group only for a model with experts."""
    build(*REFUSED["qwen3_moe"][:2], seed=0).save_pretrained(folder)
    with set_current_vllm_config(engine_config(folder)):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)


def engine_config(folder: Path) -> VllmConfig:
    return EngineArgs(
        model=str(folder), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=64
    ).create_engine_config()


if __name__ == "__main__":
    main()
