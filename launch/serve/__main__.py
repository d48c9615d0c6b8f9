"""A pool on its own, behind an OpenAI-compatible server (entry point of every rank).

torchrun --standalone --nproc-per-node 3 -m rollcast.launch.serve --model ./Qwen3-0.6B
"""

import argparse
import os
import shlex
import sys
import threading
from pathlib import Path
from typing import Any

from rollcast.launch.signals import end_soon_on_signals
from rollcast.rollout import Job, RollcastError, RolloutConfig, join

DESCRIPTION = """Serve a model from a pool of vLLM engines: rank 0 is the front door, the other ranks are engines,
with a GPU each.
OpenAI's clients talk to it (/v1/chat/completions, /v1/completions, /v1/models; /health and /metrics beside them), and
each request goes to the engine with the least to do, or to one that has computed its beginning. With --openai-port
every engine has vLLM's own server beside it: tools, structured output, logprobs, and no balancing.

  torchrun --standalone --nproc-per-node 3 -m rollcast.launch.serve --model ./Qwen3-0.6B --port 8000
"""


def main() -> int:
    """Parse flags, take this rank's place, serve until a signal. Returns the exit code."""
    options = parse()
    try:
        if os.environ.get("RANK", "0") == "0":
            end_soon_on_signals()
        with join(rollout_config(options)) as job:
            if job.is_trainer:
                serve(job, options)
    except RollcastError as error:
        print(f"rollcast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def serve(job: Job, options: argparse.Namespace) -> None:
    """Rank 0: answer until it is interrupted."""
    from transformers import AutoTokenizer

    from rollcast.launch.serve.frontend import FrontDoor, served

    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    name = options.served_model_name or Path(options.model).resolve().name
    door = FrontDoor(job.pool, tokenizer, model=name, max_model_len=job.config.resolved_max_model_len())
    with served(door.app(), host=options.host, port=options.port) as address:
        print(f"rollcast: {job.pool.engines} engine(s) serve {name} at {address}/v1", flush=True)
        for engine in job.pool.describe():
            if engine.openai:
                print(
                    f"rollcast: engine {engine.engine} alone, with all that vLLM's server has, at {engine.openai}",
                    flush=True,
                )
        threading.Event().wait()


def rollout_config(options: argparse.Namespace) -> RolloutConfig:
    """The engines' settings."""
    return RolloutConfig(
        model=options.model,
        # The front door needs none.
        trainer_gpus=False,
        tensor_parallel_size=options.tensor_parallel_size,
        device=options.device,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        gpu_memory_utilization=options.gpu_memory_utilization,
        enforce_eager=options.enforce_eager,
        openai_port=options.openai_port,
        openai_flags=options.openai_flags,
        log_dir=options.log_dir,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; defaults are those of `RolloutConfig`."""
    default = RolloutConfig(model="", dtype="float32")
    parser = argparse.ArgumentParser(
        prog="rollcast.launch.serve", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="a Hugging Face folder, tokenizer included")
    add("--served-model-name", metavar="NAME", help="what clients call it; default: the folder's name")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen on; 0: a free one (8000)")
    add(
        "--openai-port",
        type=int,
        metavar="N",
        help="engine i also answers at N + i, by vLLM's own server; 0: free ones",
    )
    add(
        "--openai-flags",
        type=shlex.split,
        default=(),
        metavar="FLAGS",
        help="of `vllm serve`, for it: '--tool-call-parser hermes'",
    )
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks of one engine (1)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is a GPU")
    add("--dtype", default="auto", help="of the weights; auto: what config.json says")
    add("--max-model-len", type=int, metavar="N", help="longest prompt plus completion in tokens")
    add("--gpu-memory-utilization", type=float, default=default.gpu_memory_utilization, metavar="X", help="(0.9)")
    add("--enforce-eager", action="store_true", help="no torch.compile and CUDA graphs")
    add("--log-dir", metavar="FOLDER", help="where the engines' logs go; default: a temporary folder")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
