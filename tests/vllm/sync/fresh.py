"""Load a checkpoint from disk with vLLM alone; report what the engine holds and generates (a plain process).

fresh.py MODEL_FOLDER REPORT.json TENSOR_PARALLEL_SIZE
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
from models import PROMPTS


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """What a fresh engine holds and generates."""

    workers: list[dict[str, str]]
    """Fingerprints by worker."""
    tokens: list[list[int]]
    """Greedy completions of `models.PROMPTS`."""


def main() -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=sys.argv[1],
        dtype="float32",
        enforce_eager=True,
        gpu_memory_utilization=0.2,
        skip_tokenizer_init=True,
        max_model_len=64,
        tensor_parallel_size=int(sys.argv[3]),
        worker_extension_cls="rollcast.rollout.worker.RollcastWorker",
    )
    workers = llm.collective_rpc("rollcast_fingerprint")
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    Path(sys.argv[2]).write_bytes(msgspec.json.encode(Fresh(workers=workers, tokens=tokens)))


if __name__ == "__main__":
    main()
