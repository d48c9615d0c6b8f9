"""A pool on its own, behind an OpenAI-compatible server (entry point of every rank).

torchrun --standalone --nproc-per-node 3 -m rollcast.launch.serve --model ./Qwen3-0.6B
"""

import argparse
import os
import shlex
import sys
import threading

from rollcast.launch.signals import end_soon_on_signals
from rollcast.rollout import Job, PreflightError, RollcastError, RolloutConfig, join

DESCRIPTION = """Serve a model from a pool of vLLM engines: rank 0 balances requests over the other ranks, which are
engines with a GPU each.

Every engine has vLLM's own OpenAI-compatible server, and rank 0 forwards each request to one of them as it is: chat and
plain completions, the Responses API, tools, structured output, streams. It chooses the engine with the fewest requests,
or one that has computed the request's beginning. Responses have the policy version in the header x-rollcast-version and
in their body. /health says which engines serve; /metrics is for Prometheus.

  torchrun --standalone --nproc-per-node 3 -m rollcast.launch.serve --model ./Qwen3-0.6B --port 8000
  torchrun --standalone --nproc-per-node 3 -m rollcast.launch.serve --model ./Qwen3-0.6B \\
      --openai-flags "--enable-auto-tool-choice --tool-call-parser hermes"
"""
READ_TIMEOUT_S = 3600.0


def main() -> int:
    """Parse flags, take this rank's place, serve until a signal. Return the exit code."""
    options = parse()
    try:
        if os.environ.get("RANK", "0") == "0":
            end_soon_on_signals()
        with join(rollout_config(options)) as job:
            if job.is_trainer:
                serve(job, options)
    except (RollcastError, OSError) as error:
        print(f"rollcast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def serve(job: Job, options: argparse.Namespace) -> None:
    """Forward requests on rank 0 until it is interrupted."""
    # The engines need none of this, and `--help` is quick without it.
    from rollcast.launch.serve.frontend import Frontend, serve_app

    addresses = [str(engine.openai) for engine in job.pool.describe()]
    frontend = Frontend(addresses, registry=job.pool.metrics.registry, read_timeout_s=options.read_timeout)
    with serve_app(frontend.app(), host=options.host, port=options.port) as address:
        print(f"rollcast: {len(addresses)} engine(s) serve {options.model} at {address}/v1", flush=True)
        for engine, own in enumerate(addresses):
            print(f"rollcast: engine {engine} alone at {own}", flush=True)
        threading.Event().wait()


def rollout_config(options: argparse.Namespace) -> RolloutConfig:
    """Return the engines' settings."""
    flags = list(options.openai_flags)
    if any(flag.startswith("--ssl") for flag in flags):
        raise PreflightError("rank 0 speaks plain HTTP with the engines: leave --ssl-* out of --openai-flags")
    if options.served_model_name:
        flags += ["--served-model-name", options.served_model_name]
    return RolloutConfig(
        model=options.model,
        # Rank 0 computes nothing.
        trainer_gpus=False,
        tensor_parallel_size=options.tensor_parallel_size,
        device=options.device,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        gpu_memory_utilization=options.gpu_memory_utilization,
        enforce_eager=options.enforce_eager,
        openai_port=options.openai_port,
        openai_flags=flags,
        log_dir=options.log_dir,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; defaults are those of `RolloutConfig`."""
    default = RolloutConfig(model="", dtype="float32")
    parser = argparse.ArgumentParser(
        prog="rollcast.launch.serve", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="a Hugging Face folder, tokenizer included")
    add("--served-model-name", metavar="NAME", help="name of the model for clients; default: the folder's name")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen on; 0: a free one (8000)")
    add(
        "--read-timeout",
        type=float,
        default=READ_TIMEOUT_S,
        metavar="S",
        help=f"longest silence of an engine in seconds; without stream, longest response ({READ_TIMEOUT_S:g})",
    )
    add(
        "--openai-port",
        type=int,
        default=0,
        metavar="N",
        help="engine i's own server listens at N + i; 0: at a free port (0)",
    )
    add(
        "--openai-flags",
        type=shlex.split,
        default=[],
        metavar="FLAGS",
        help="flags of `vllm serve` for the engines' servers: --openai-flags='--tool-call-parser hermes'",
    )
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks of one engine (1)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is a GPU")
    add("--dtype", default="auto", help="of the weights; auto: what config.json says")
    add("--max-model-len", type=int, metavar="N", help="longest prompt plus completion in tokens")
    add("--gpu-memory-utilization", type=float, default=default.gpu_memory_utilization, metavar="X", help="(0.9)")
    add("--enforce-eager", action="store_true", help="no torch.compile and CUDA graphs")
    add("--log-dir", metavar="FOLDER", help="where the engines' logs go; default: a temporary folder")
    options = parser.parse_args(arguments)
    if options.read_timeout <= 0:
        parser.error("--read-timeout must be positive")
    return options


if __name__ == "__main__":
    sys.exit(main())
