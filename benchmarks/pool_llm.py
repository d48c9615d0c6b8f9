"""The reference of `pool_overhead.py`: vLLM's own `LLM` in processes of its own, driven over a pipe."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The requests of one round, and the engine's settings; the same for the pool and for `LLM`."""

    model: str
    dtype: str
    eager: bool
    requests: int
    max_tokens: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))

    def prompts(self) -> list[list[int]]:
        """Return the prompts' token ids; all have the same length."""
        return [[3 + (index + place) % 20 for place in range(8)] for index in range(self.requests)]


class LlmProcess:
    """A process with an `LLM`, driven by the process that times it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def facts(self) -> dict[str, Any]:
        """Return `bench_facts` of its engine. Blocks until the engine is ready."""
        return json.loads(self._next("facts"))

    def generate(self) -> float:
        """Generate once; return the seconds."""
        assert self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)
        return float(self._next("took"))

    def _next(self, key: str) -> str:
        """Return the rest of the next line that begins with `key`."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(f"{key} "):
                return line.removeprefix(key)
        raise RuntimeError("the process of vLLM's own LLM has ended: its error is above")


@contextlib.contextmanager
def llm_process(load: Workload) -> Iterator[LlmProcess]:
    """Start the process, with a KV cache as large as that of the pool's engine; kill it when the context ends."""
    from rollcast.rollout.job.world import without_torchrun

    environ = {"VLLM_CPU_KVCACHE_SPACE": "1"} | without_torchrun(os.environ)
    with subprocess.Popen(
        [sys.executable, __file__, load.to_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"VLLM_LOGGING_LEVEL": "ERROR"} | environ,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield LlmProcess(process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def serve(load: Workload) -> None:
    """Print the engine's facts, then generate once for every line on standard input."""
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = {
        # With "auto", vLLM uses bfloat16 where the model's own is float32.
        "dtype": load.dtype,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enforce_eager": load.eager,
        "gpu_memory_utilization": 0.4,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "engine_facts.FactsWorker",
    }
    llm = LLM(load.model, **settings)
    # As the pool asks for it.
    options: dict[str, Any] = {"ignore_eos": True, "detokenize": False, "logprobs": 0, "flat_logprobs": True}
    sampling = SamplingParams(max_tokens=load.max_tokens, **options)
    prompts = [{"prompt_token_ids": prompt} for prompt in load.prompts()]
    print(f"facts {json.dumps(llm.collective_rpc('bench_facts')[0])}", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)  # pyright: ignore[reportArgumentType]
        print(f"took {time.perf_counter() - start}", flush=True)


if __name__ == "__main__":
    serve(Workload.from_json(sys.argv[1]))
