"""The one place of a job's settings and their defaults (every process)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rollcast.rollout.errors import PreflightError

PAUSE_MODES = ("keep", "wait", "abort")
PREFIX_CACHE_POLICIES = ("salt", "clear", "keep")
KV_CACHE_POLICIES = ("kept", "recomputed")
SYNC_ASLEEP = ("refuse", "wake")
SYNC_MODES = ("in_place", "shadow")
TRANSPORTS = ("auto", "nccl", "ipc")
VERIFY_MODES = ("none", "checksum", "full")
CPU_WEIGHTS = ("packed", "plain")
# How the setting reaches the workers: vLLM offers no way to hand them one before they load the model.
CPU_WEIGHTS_VARIABLE = "ROLLCAST_CPU_WEIGHTS"
POSITIVE = (
    "trainers",
    "tensor_parallel_size",
    "bucket_bytes",
    "sync_timeout_s",
    "trainer_timeout_s",
    "start_timeout_s",
    "lora_versions",
)
POSITIVE_IF_ANY = ("max_model_len", "lora_rank")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.json")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class How:
    """The way of one sync."""

    mode: str
    pause_mode: str
    kv_cache: str
    verify: str
    unchanged: bool = False
    """A self-test."""

    def check(self) -> None:
        one_of("mode", self.mode, SYNC_MODES)
        one_of("pause_mode", self.pause_mode, PAUSE_MODES)
        one_of("kv_cache", self.kv_cache, KV_CACHE_POLICIES)
        one_of("verify", self.verify, VERIFY_MODES)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the ranks of one torchrun job are split, and how their engines run.

    Ranks `[0, trainers)` train; every next `tensor_parallel_size` ranks form an engine. Every rank passes the
    same values. Raises `PreflightError` (a `ValueError`) on values that cannot work.
    """

    model: str
    """Folder of a Hugging Face model: config.json, and weights unless `load_format` is "dummy"."""
    trainers: int = 1
    tensor_parallel_size: int = 1
    colocate: bool = False
    """Engines share the trainers' GPUs, rank `trainers + i` that of rank `i`, instead of having their own. Give
    `gpu_memory_utilization` their share, and let them sleep (`pool.sleep`) while the trainer trains."""
    trainer_gpus: bool = True
    """False: trainer ranks take no GPU, and their machine's first is the first engine's. For a pool that is sent no
    weights, as a server's is."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": CUDA where torch sees a GPU."""
    dtype: str = "auto"
    """Dtype of the engines and of floating-point weights on the wire; "auto" is config.json's own."""
    max_model_len: int | None = None
    """Longest prompt plus completion, in tokens. None: what config.json says."""
    load_format: str = "auto"
    seed: int = 0
    enforce_eager: bool = False
    """Run the engines without torch.compile and CUDA graphs: faster to start, slower to decode."""
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int | None = None
    """Most sequences that one engine decodes at a time. None: as many as vLLM's `LLM` does (1,024 on an H200).
    Of tokens in a step, too, an engine takes as many as `LLM` (16,384), unless `engine_args` has
    `max_num_batched_tokens`: fewer leave more memory to the KV cache."""
    deterministic: bool = False
    """The same seed, model and calls in the same order give the same tokens: every request gets a seed of its own,
    prompts go to engines in turn, an engine runs one `generate` call at a time, without a prefix cache. Slower. On
    policy only: a sync that meets requests in flight meets them where it happens to."""
    openai_port: int | None = None
    """Engine i also answers at port `openai_port` + i with vLLM's own OpenAI-compatible server, whose requests take
    part in syncs: `pool.describe()[i].openai` is its address. 0: a free port. None: no server."""
    openai_flags: Sequence[str] = ()
    """Flags of `vllm serve` for it: ("--tool-call-parser", "hermes", "--enable-auto-tool-choice")."""
    lora_rank: int | None = None
    """Engines keep their base weights and take LoRA adapters of at most this rank: `job.broadcaster` wants a peft
    model, and sends its A and B alone. None: full weights; a peft model's adapter is folded into them on the way."""
    lora_versions: int = 1
    """Adapter versions that an engine serves at a time. 1: requests in flight go over to each new version. N: they
    stay with the one that they started with for N - 1 syncs, and then go over to the newest."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """More fields of vLLM's `AsyncEngineArgs`; JSON values only."""
    worker_extension_cls: str = "rollcast.rollout.worker.RollcastWorker"
    """Replace by a subclass to add methods to the workers. Must be importable in the engine's processes."""
    pause_mode: str = "keep"
    """What a sync does to requests in flight. "keep" goes on with them, "wait" lets them finish before, "abort" takes
    the pool's out of the engine and runs them again from the tokens that they have, under the new weights."""
    kv_cache: str = "kept"
    """Of requests that "keep" goes on with. "kept": they use the keys and values that the old weights have made.
    "recomputed": these are made anew by the new weights, and so is the prefix cache."""
    sync_asleep: str = "refuse"
    """What a sync does when an engine's weights sleep: "refuse" it, or "wake" them first."""
    prefix_cache: str = "salt"
    """What a sync does to the prefix cache. "salt": later requests do not find the keys of older weights, which are
    dropped as room is needed. "clear": it is emptied, and requests in flight are run again from their start. "keep":
    it stays, and serves keys of the old weights."""
    sync_mode: str = "in_place"
    """How weights arrive. "in_place": in the live parameters, while the engine holds still. "shadow": in spare GPU
    memory, as much as the weights take, while the engine decodes; then it holds still for one copy. (An engine that
    refuses to generate after a failure receives in place.)"""
    transport: str = "auto"
    """How bytes travel between GPUs. "nccl": grouped broadcasts. "ipc": workers read the trainer's memory, on one
    machine. "auto": "ipc" where trainer and worker share a GPU, which NCCL cannot join twice, and where one worker
    reads over NVLink, which is a little faster; else "nccl"."""
    verify: str = "none"
    """How a sync makes sure that the weights are those that were sent. "checksum" compares 64-bit hashes of every
    stretch of bytes, made on both sides' devices. "full" also sends everything again and compares it with what is
    in memory: twice the time."""
    cpu_weights: str = "packed"
    """Layout of linear weights in CPU engines: "packed" is vLLM's, "plain" the one that CUDA engines have."""
    bucket_bytes: int = 1 << 30
    """Most bytes of one grouped broadcast. Where weights are cast, strided or processed, two buffers of as much."""
    sync_timeout_s: float = 60.0
    """A sync that takes longer fails, on every trainer rank."""
    trainer_timeout_s: float = 600.0
    """How long trainer ranks wait for each other before a sync starts: one may still be saving a checkpoint."""
    start_timeout_s: float = 600.0
    """Seconds that an engine may take to start."""
    metrics_port: int | None = None
    """Trainer rank r answers Prometheus' scrapes at `metrics_port` + r. None: `pool.metrics` counts all the same."""
    log_dir: str | None = None
    """Folder of the engines' logs. None: a temporary folder, named in the error if an engine dies."""

    def __post_init__(self) -> None:
        one_of("pause_mode", self.pause_mode, PAUSE_MODES)
        one_of("kv_cache", self.kv_cache, KV_CACHE_POLICIES)
        one_of("sync_asleep", self.sync_asleep, SYNC_ASLEEP)
        one_of("prefix_cache", self.prefix_cache, PREFIX_CACHE_POLICIES)
        one_of("verify", self.verify, VERIFY_MODES)
        one_of("sync_mode", self.sync_mode, SYNC_MODES)
        one_of("transport", self.transport, TRANSPORTS)
        one_of("cpu_weights", self.cpu_weights, CPU_WEIGHTS)
        one_of("device", self.device, DEVICES)
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise PreflightError(f"{name} must be positive, got {getattr(self, name)}")
        for name in POSITIVE_IF_ANY:
            if (value := getattr(self, name)) is not None and value <= 0:
                raise PreflightError(f"{name} must be positive, got {value}")
        if self.colocate and not self.trainer_gpus:
            raise PreflightError("colocate=True shares the trainers' GPUs: leave trainer_gpus True")
        one_of("dtype", self.resolved_dtype(), DTYPES)
        if self.openai_port is not None:
            self._check_server(self.openai_port)
        elif self.openai_flags:
            raise PreflightError("openai_flags are of the engines' own servers: set openai_port")
        if self.deterministic and self.engine_args.get("enable_prefix_caching"):
            raise PreflightError("deterministic engines have no prefix cache: leave enable_prefix_caching out")

    def _check_server(self, port: int) -> None:
        if not 0 <= port < 1 << 16:
            raise PreflightError(f"openai_port must be a port or 0, got {port}")
        if self.deterministic:
            raise PreflightError("deterministic engines run whole batches, not single requests: leave openai_port out")
        if not any(Path(self.model, name).is_file() for name in TOKENIZERS):
            raise PreflightError(f"model {self.model!r} has no tokenizer, and vLLM's server (openai_port) takes text")

    def model_config(self) -> dict[str, Any]:
        """config.json of the model; the language part where there are several."""
        path = Path(self.model, "config.json")
        if not path.is_file():
            raise PreflightError(
                f"model {self.model!r} has no config.json: pass the folder of a Hugging Face model "
                "(one that transformers' save_pretrained wrote)"
            )
        config = json.loads(path.read_text())
        return config | config.get("text_config", {})

    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: those of generation_config.json, else of config.json."""
        path = Path(self.model, "generation_config.json")
        generation = json.loads(path.read_text()) if path.is_file() else {}
        ids = generation.get("eos_token_id", self.model_config().get("eos_token_id"))
        return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)

    def resolved_dtype(self) -> str:
        """Name of the torch dtype that engines and wire use."""
        if self.dtype != "auto":
            return self.dtype
        config = self.model_config()
        return config.get("dtype") or config.get("torch_dtype") or "float32"

    def how(
        self,
        *,
        mode: str | None = None,
        pause_mode: str | None = None,
        kv_cache: str | None = None,
        verify: str | None = None,
    ) -> How:
        """How to sync: as given, or as configured where None."""
        return How(
            mode=mode or self.sync_mode,
            pause_mode=pause_mode or self.pause_mode,
            kv_cache=kv_cache or self.kv_cache,
            verify=verify or self.verify,
        )

    def torch_dtype(self) -> torch.dtype:
        """`resolved_dtype` as torch's object."""
        return getattr(torch, self.resolved_dtype())

    def resolved_max_model_len(self) -> int:
        """Longest prompt plus completion in tokens."""
        config = self.model_config()
        limit: int | None = config.get("max_position_embeddings") or config.get("n_positions")
        wanted = self.max_model_len
        if wanted is None and limit is None:
            raise PreflightError(f"config.json of {self.model!r} has no max_position_embeddings: set max_model_len")
        if wanted is not None and limit is not None and wanted > limit:
            raise PreflightError(f"max_model_len {wanted} is more than the model's own {limit}")
        chosen = wanted or limit
        assert chosen is not None
        return chosen

    def resolved_device(self) -> str:
        """The kind of device: "cpu" or "cuda"."""
        if self.device == "auto":
            return "cuda" if torch.cuda.device_count() else "cpu"
        return self.device


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `PreflightError` (a `ValueError`) unless `value` is allowed."""
    if value not in allowed:
        raise PreflightError(f"unknown {name} {value!r}, expected one of {', '.join(allowed)}")
