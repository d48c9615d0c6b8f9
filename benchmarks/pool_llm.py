"""vLLM's own side of `pool_overhead.py`: an `LLM`, in processes of its own, that generates when it is told to."""

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
class Load:
    """What both sides are to do in a round, and with which engine."""

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
        """Token ids; all of a length."""
        return [[3 + (index + place) % 20 for place in range(8)] for index in range(self.requests)]


class OtherSide:
    """The `LLM`, as the process that times it sees it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def facts(self) -> dict[str, Any]:
        """What `bench_facts` says of its engine. Blocks until it is ready."""
        return json.loads(self._next("facts"))

    def generate(self) -> float:
        """Let it generate once: its seconds."""
        assert self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)
        return float(self._next("took"))

    def _next(self, word: str) -> str:
        """The rest of the next line that begins with the word."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(f"{word} "):
                return line.removeprefix(word)
        raise RuntimeError("vLLM's own side has ended: its error is above")


@contextlib.contextmanager
def other_side(load: Load) -> Iterator[OtherSide]:
    """Start it, with as many keys and values in memory as the pool's engine has."""
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
            yield OtherSide(process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def serve(load: Load) -> None:
    """Say what the engine is like, then generate for every line that is read."""
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = {
        # With "auto", vLLM uses bfloat16 where the model's own is float32.
        "dtype": load.dtype,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enforce_eager": load.eager,
        "gpu_memory_utilization": 0.4,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "latency.facts.FactsWorker",
    }
    llm = LLM(load.model, **settings)
    how: dict[str, Any] = {"ignore_eos": True, "detokenize": False, "logprobs": 0, "flat_logprobs": True}
    sampling = SamplingParams(max_tokens=load.max_tokens, **how)
    prompts = [{"prompt_token_ids": prompt} for prompt in load.prompts()]
    print(f"facts {json.dumps(llm.collective_rpc('bench_facts')[0])}", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)  # pyright: ignore[reportArgumentType]
        print(f"took {time.perf_counter() - start}", flush=True)


if __name__ == "__main__":
    serve(Load.from_json(sys.argv[1]))
