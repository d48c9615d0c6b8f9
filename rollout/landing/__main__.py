"""`python -m rollcast.rollout.landing`: print the landing plan of a model folder (no engine, no GPU)."""

import argparse
import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rollcast.comm import Holders, Manifest, Move, TransferPlan, build_transfer
from rollcast.rollout.config import CPU_WEIGHTS, CPU_WEIGHTS_VARIABLE, DTYPES, RolloutConfig
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.compiler import compile_landing
from rollcast.rollout.landing.offline import OfflineModels, checkpoint_manifest, missing_architecture
from rollcast.rollout.landing.plan import LandingPlan
from rollcast.rollout.landing.vllm_reload import choose_cpu_layout

EXAMPLES = """examples:
  python -m rollcast.rollout.landing --model ~/models/Qwen3-8B
  python -m rollcast.rollout.landing --model ~/models/Qwen3-30B-A3B --tensor-parallel-size 2 --json

The model's weights are not needed, only its config.json. The exit status is 1 if the plan has problems.
"""


@dataclass(frozen=True)
class Overview:
    """The plans of all workers of one engine."""

    manifest: Manifest
    workers: int
    plans: list[LandingPlan]
    """Plans of the workers whose loaders could be followed."""
    transfer: TransferPlan | None
    """None if there is no plan of every worker, or no transfer plan for them."""
    problems: list[str]

    def moves(self) -> list[Move]:
        """Return the moves of all workers."""
        return [move for plan in self.plans for move in plan.moves]

    def staged(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return the number of modules and bytes, by kind of stage and reason."""
        totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for plan in self.plans:
            sizes: dict[int | None, int] = defaultdict(int)
            for move in plan.moves:
                sizes[move.stage] += move.nbytes
            for number, stage in enumerate(plan.stages):
                total = totals[stage.kind, stage.reasons[0].replace(f"{stage.module}.", "")]
                total[0] += 1
                total[1] += sizes[number]
        return {key: (modules, nbytes) for key, (modules, nbytes) in totals.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON. Moves and bytes are those of all workers together."""
        moves = self.moves()
        lanes = self.transfer.lanes if self.transfer else ()
        return {
            "parameters": len(self.manifest.specs),
            "checkpoint_bytes": self.manifest.nbytes,
            "workers": self.workers,
            "moves": len(moves),
            "zero_copy_bytes": sum(move.nbytes for move in moves if move.in_place),
            "staged_bytes": sum(move.nbytes for move in moves if move.stage is not None),
            "total_bytes": sum(move.nbytes for move in moves),
            "staged": [
                {"kind": kind, "why": why, "modules": modules, "bytes": nbytes}
                for (kind, why), (modules, nbytes) in self.staged().items()
            ],
            "lanes": [
                {
                    "workers": list(lane.workers),
                    "bytes_per_worker": lane.nbytes,
                    "messages": len(lane.messages),
                    "buckets": len(lane.buckets),
                }
                for lane in lanes
            ],
            "unused": [len(plan.unused) for plan in self.plans],
            "problems": self.problems,
        }


def overview(folder: str, *, size: int, dtype: str, bucket_bytes: int, expert_parallel: bool) -> Overview:
    """Compile the plan of every tensor-parallel rank of an engine for the model."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    settings = missing_architecture(folder) | ({"enable_expert_parallel": True} if expert_parallel else {})
    models = OfflineModels(folder, dtype=dtype, load_format="dummy", **settings)
    manifest = checkpoint_manifest(folder)
    plans: list[LandingPlan] = []
    problems: list[str] = []
    for rank in range(size):
        model = models.build(folder, rank=rank, size=size)
        with models.as_rank(folder, rank=rank, size=size):
            try:
                plans.append(compile_landing(model, manifest, dtype=torch_dtype))
                problems += plans[-1].check()
            except LandingError as error:
                problems.append(str(error))
    transfer = None
    if len(plans) == size:
        try:
            landings = {plan.digest: plan.moves for plan in plans}
            holders, digests = Holders.replicated(manifest, 1), [plan.digest for plan in plans]
            transfer = build_transfer(holders, landings, digests, bucket_bytes=bucket_bytes)
        except ValueError as error:
            problems.append(str(error))
    return Overview(manifest, size, plans, transfer, list(dict.fromkeys(problems)))


def print_tables(plans: Overview, console: Console) -> None:
    """Print the plans as tables."""
    facts = plans.to_dict()
    total = facts["total_bytes"] or 1
    summary = Table(title="Landing plan", title_justify="left", show_header=False)
    summary.add_row("parameters", f"{facts['parameters']:,}", size_text(facts["checkpoint_bytes"]))
    summary.add_row("workers", str(facts["workers"]), "")
    summary.add_row("moves", f"{facts['moves']:,}", size_text(facts["total_bytes"]))
    for name in ("zero_copy", "staged"):
        nbytes = facts[f"{name}_bytes"]
        summary.add_row(name.replace("_", "-"), f"{nbytes / total:.1%}", size_text(nbytes))
    buffered = total - facts["zero_copy_bytes"] - facts["staged_bytes"] if facts["total_bytes"] else 0
    summary.add_row("cast or strided", f"{buffered / total:.1%}", size_text(buffered))
    console.print(summary)
    if facts["staged"]:
        table = Table("kind", "modules", "bytes", "why", title="Not received in place", title_justify="left")
        table.caption = "why: what vLLM does with loaded weights (staged), or its loader with arriving ones (tape)"
        for row in facts["staged"]:
            table.add_row(row["kind"], str(row["modules"]), size_text(row["bytes"]), row["why"])
        console.print(table)
    lanes = Table("lane", "workers", "bytes per worker", "messages", "buckets", title="Lanes", title_justify="left")
    for index, lane in enumerate(facts["lanes"]):
        workers = ", ".join(map(str, lane["workers"]))
        per_worker = size_text(lane["bytes_per_worker"])
        lanes.add_row(str(index), workers, per_worker, f"{lane['messages']:,}", str(lane["buckets"]))
    console.print(lanes)
    for problem in plans.problems:
        console.print(f"[red]problem[/red] {problem}", highlight=False)
    if not plans.problems:
        console.print("[green]no problems[/green]: every element of every loadable parameter is written exactly once")


def size_text(nbytes: int) -> str:
    """Return a number of bytes as text, in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rollcast.rollout.landing",
        description="Show where every byte of a model's weights lands in the workers of a vLLM engine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="folder of a Hugging Face model (config.json)")
    add("--tensor-parallel-size", type=int, default=1, metavar="K", help="workers of the engine (default 1)")
    add("--enable-expert-parallel", action="store_true", help="split whole experts over the workers")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="dtype of the engine (default: config.json's)")
    add("--bucket-bytes", type=int, default=RolloutConfig.bucket_bytes, metavar="N", help="bytes of one broadcast")
    add("--cpu-weights", choices=CPU_WEIGHTS, default=CPU_WEIGHTS[0], help="layout of linear weights on CPU")
    add("--json", action="store_true", help="print one JSON object, as the last line, instead of tables")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status: 1 if the plan has problems, 2 if there is none."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.tensor_parallel_size < 1:
        parser.error(f"--tensor-parallel-size must be positive, got {options.tensor_parallel_size}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ[CPU_WEIGHTS_VARIABLE] = options.cpu_weights
    try:
        config = RolloutConfig(model=options.model, dtype=options.dtype, bucket_bytes=options.bucket_bytes)
        choose_cpu_layout()
        plans = overview(
            options.model,
            size=options.tensor_parallel_size,
            dtype=config.resolved_dtype(),
            bucket_bytes=options.bucket_bytes,
            expert_parallel=options.enable_expert_parallel,
        )
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if options.json:
        sys.stdout.write(json.dumps(plans.to_dict()) + "\n")
    else:
        print_tables(plans, Console())
    return 1 if plans.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
