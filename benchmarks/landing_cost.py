"""Cost of a sync for a worker beside the wire: the landing plan against memcpy and vLLM's layerwise reload, on CPU.

    python benchmarks/landing_cost.py [--json FILE]

One process, vLLM's own models with random weights, weights in the layout that CUDA has (experts are packed on CPU
in any case), one thread. Seconds are those that the thread runs: what else runs on the machine does not count.
Everything is measured in turn, many times, and medians are compared. The last line is one JSON document.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "ROLLCAST_CPU_WEIGHTS": "plain"}

import torch
import transformers
from latency.models import with_single_experts
from loaded_models import LoadedModels
from local_transfer import LocalTransfer
from machine_card import commit, cpu_card, versions
from rich.console import Console
from rich.table import Table

from rollcast.rollout.landing.apply import LiveLanding
from rollcast.rollout.landing.compiler import compile_landing
from rollcast.rollout.landing.offline import checkpoint_manifest
from rollcast.rollout.landing.vllm_reload import choose_cpu_layout

DTYPE = torch.bfloat16
COMMON = {"vocab_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
DENSE = COMMON | {"hidden_size": 512, "head_dim": 64, "num_hidden_layers": 36, "intermediate_size": 1536}
EXPERTS = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 32}
MOE = COMMON | EXPERTS | {"hidden_size": 512, "head_dim": 64, "num_hidden_layers": 24}
MODELS: dict[str, Any] = {
    "qwen3, 36 layers": (transformers.Qwen3Config, DENSE),
    "qwen3_moe, 24 layers, 64 experts": (transformers.Qwen3MoeConfig, MOE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What a sync costs a worker beside the wire.")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="times that each is measured (15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document to this file, too")
    options = parser.parse_args()
    # Compare the work, not how fast this machine wakes threads for each of hundreds of copies.
    torch.set_num_threads(1)
    torch.accelerator.empty_cache = lambda: None
    choose_cpu_layout()
    folder = Path(tempfile.mkdtemp())
    folders: dict[str, Path] = {}
    for index, (name, (config, settings)) in enumerate(MODELS.items()):
        architectures = [config.__name__.replace("Config", "ForCausalLM")]
        folders[name] = folder / str(index)
        config(**settings, dtype=DTYPE, architectures=architectures).save_pretrained(folders[name])
    # vLLM makes an expert parallel group only for a model with experts.
    models = LoadedModels(list(folders.values())[-1], dtype="bfloat16", load_format="dummy", max_model_len=64)
    rows = [measure(models, name, folders[name], options.repeats) for name in MODELS]
    show(rows)
    document = json.dumps({"machine": machine(), "versions": versions(), **provenance(), "results": rows})
    if options.json:
        options.json.write_text(document + "\n")
    sys.stdout.write(document + "\n")


def measure(models: LoadedModels, name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Measure one model and return its row."""
    manifest = with_single_experts(checkpoint_manifest(folder))
    model = models.load(folder)
    sources = [torch.empty(spec.shape, dtype=spec.dtype).normal_(std=0.02) for spec in manifest.specs]
    flat = torch.empty(manifest.nbytes, dtype=torch.uint8).random_()
    copy = torch.empty_like(flat)
    with models.as_rank(folder, rank=0, size=1) as config, torch.no_grad():
        start = time.thread_time()
        landing = LiveLanding(compile_landing(model, manifest, dtype=DTYPE), model, dtype=DTYPE)
        compile_s = time.thread_time() - start
        transfer = LocalTransfer(landing, sources)
        named = [(spec.name, tensor) for spec, tensor in zip(manifest.specs, sources, strict=True)]
        actions: dict[str, Callable[[], Any]] = {
            "memcpy": lambda: copy.copy_(flat),
            "plan": transfer.apply,
            "layerwise_reload": lambda: reload_layerwise(model, named, config),
        }
        for act in actions.values():
            act()
        calls = {what: count_calls(act) for what, act in actions.items() if what != "memcpy"}
        times: dict[str, list[float]] = {what: [] for what in actions}
        for _ in range(repeats):
            for what, act in actions.items():
                times[what].append(timed(act))
    seconds = {what: statistics.median(samples) for what, samples in times.items()}
    plan = landing.plan
    return {
        "model": name,
        "tensors": len(manifest.specs),
        "bytes": manifest.nbytes,
        "staged_modules": len(plan.stages),
        "compile_s": compile_s,
        "p50_s": seconds,
        "min_s": {what: min(samples) for what, samples in times.items()},
        "python_calls": calls,
        "plan_to_memcpy": seconds["plan"] / seconds["memcpy"],
        "reload_to_plan": seconds["layerwise_reload"] / seconds["plan"],
        "repeats": repeats,
    }


def reload_layerwise(model: Any, named: list[tuple[str, torch.Tensor]], config: Any) -> None:
    """Load the weights as vLLM's own weight transfer does after receiving them."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    model.load_weights(iter(named))
    finalize_layerwise_reload(model, config.model_config)


def count_calls(act: Callable[[], Any]) -> int:
    """Count the Python functions that are called; C functions are not counted."""
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
    return calls


def timed(act: Callable[[], Any]) -> float:
    start = time.thread_time()
    act()
    return time.thread_time() - start


def machine() -> dict[str, Any]:
    return cpu_card() | {"threads": torch.get_num_threads()}


def provenance() -> dict[str, str]:
    return {"commit": commit(), "command": "python benchmarks/landing_cost.py"}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("model", "tensors", "MB", "compile s", "memcpy ms", "plan ms", "reload ms", "calls", "reload calls")
    for row in rows:
        times = [f"{row['p50_s'][what] * 1e3:.1f}" for what in ("memcpy", "plan", "layerwise_reload")]
        calls = [f"{row['python_calls'][what]:,}" for what in ("plan", "layerwise_reload")]
        table.add_row(
            row["model"], str(row["tensors"]), f"{row['bytes'] / 1e6:.0f}", f"{row['compile_s']:.2f}", *times, *calls
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
