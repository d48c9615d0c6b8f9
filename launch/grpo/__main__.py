"""The main job: train a language model with GRPO and vLLM rollouts (entry point of every rank).

torchrun --standalone --nproc-per-node 2 -m rollcast.launch.grpo
"""

import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from rollcast.launch.grpo.logprob_check import LogprobError
from rollcast.launch.grpo.options import GrpoConfig, parse
from rollcast.launch.grpo.task import CHARACTERS, Task, load_task
from rollcast.launch.signals import end_soon_on_signals
from rollcast.rollout import Job, OrchestratorError, PreflightError, RollcastError, RolloutConfig, SyncError, join
from rollcast.rollout.job import World, versions
from rollcast.rollout.pool import check_prompts

STORE_TIMEOUT_S = 300.0
SAME_ON_ALL_RANKS = (PreflightError, SyncError, LogprobError, OrchestratorError)


def main() -> int:
    """Parse flags, take this rank's place, train if it is a trainer. Return the exit code."""
    config = parse()
    rank = os.environ.get("RANK", "0")
    try:
        world = World.from_env(trainers=config.trainers, tensor_parallel_size=config.tensor_parallel_size)
        run(config, world)
    except RollcastError as error:
        if rank == "0" or not isinstance(error, SAME_ON_ALL_RANKS):
            print(f"rollcast: {error}" if rank == "0" else f"rollcast, rank {rank}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run(config: GrpoConfig, world: World) -> None:
    """Run the job on any rank."""
    console = Console(quiet=world.rank != 0)
    with ExitStack() as stack:
        if world.is_trainer:
            end_soon_on_signals()
            silence_transformers()
        status = stack.enter_context(console.status(f"starting {world.engines} vLLM engine(s)"))
        folder = share_run_folder(world, config)
        rollout = rollout_config(config, folder)
        task = prepare_task(config, rollout) if world.is_trainer else None
        job = stack.enter_context(join(rollout))
        status.stop()
        if task is not None:
            train(config, job, task=task, folder=folder, console=console)


def train(config: GrpoConfig, job: Job, *, task: Task, folder: Path, console: Console) -> None:
    """Run the loop on a trainer rank; rank 0 also displays it and writes the report."""
    from rollcast.launch.grpo.report import RunReport
    from rollcast.launch.grpo.trainer import Grpo

    main_rank = job.trainer_rank == 0
    with RunReport(folder, asdict(config), versions(), config.steps, console, main_rank) as report:
        Grpo(config, job, task=task, report=report).run()


def share_run_folder(world: World, config: GrpoConfig) -> Path:
    """Return the run's folder. Rank 0 creates it, with the tiny model in it if the job needs one."""
    store = world.store(timeout_s=STORE_TIMEOUT_S)
    if world.rank == 0:
        folder = new_folder(Path(config.runs, time.strftime("%Y%m%d-%H%M%S")).resolve())
        if config.model is None:
            from rollcast.launch.grpo.tiny_model import write_tiny_model

            write_tiny_model(folder / "model", characters=CHARACTERS, seed=config.seed)
        store.set("run_folder", str(folder))
    return Path(store.get("run_folder").decode())


def new_folder(path: Path) -> Path:
    """Create `path`, or `path` with a number appended if another job created it in the same second."""
    for suffix in ("", *(f"-{count}" for count in range(2, 100))):
        folder = path.with_name(path.name + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise PreflightError(f"cannot create a run folder like {path}")


def rollout_config(config: GrpoConfig, folder: Path) -> RolloutConfig:
    """Return the engines' settings."""
    rollout = RolloutConfig(
        model=config.model or str(folder / "model"),
        trainers=config.trainers,
        tensor_parallel_size=config.tensor_parallel_size,
        device=config.device,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        seed=config.seed,
        deterministic=config.deterministic,
        pause_mode=config.pause_mode,
        bucket_bytes=config.bucket_mib << 20,
        sync_timeout_s=config.sync_timeout_s,
        verify=config.verify,
        log_dir=str(folder),
    )
    if config.model is None:
        # vLLM creates an object for each block of the KV cache: for the tiny model on a large GPU, that takes 30 s.
        rollout = replace(rollout, gpu_memory_utilization=0.2)
    eager = config.enforce_eager
    return replace(rollout, enforce_eager=rollout.resolved_device() == "cpu" if eager is None else eager)


def silence_transformers() -> None:
    """Disable its progress bars, which would break the live display."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def prepare_task(config: GrpoConfig, rollout: RolloutConfig) -> Task:
    """Load the task and check that its prompts fit the model, before any engine starts."""
    from transformers import AutoTokenizer

    rollout.model_config()
    try:
        task = load_task(config)
        tokenizer = AutoTokenizer.from_pretrained(rollout.model)
        prompts = [tokenizer.encode(prompt) for prompt in task.prompts]
        check_prompts(prompts, max_model_len=rollout.resolved_max_model_len())
    except (ValueError, OSError) as error:
        raise PreflightError(f"{error} (task, prompts and tokenizer of {rollout.model!r})") from error
    return task


if __name__ == "__main__":
    sys.exit(main())
