"""The settings of a job and their defaults, and the options of one sync (every process)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rollcast.rollout.errors import PreflightError

PAUSE_MODES = ("keep", "wait", "abort")
KV_CACHE_POLICIES = ("kept", "recomputed")
SYNC_ASLEEP = ("refuse", "wake")
SYNC_MODES = ("in_place", "shadow")
TRANSPORTS = ("auto", "nccl", "ipc")
VERIFY_MODES = ("none", "checksum", "full")
CPU_WEIGHTS = ("packed", "plain")
# Carries `cpu_weights` to the workers: vLLM passes them no settings before they load the model.
CPU_WEIGHTS_VARIABLE = "ROLLCAST_CPU_WEIGHTS"
# How vLLM starts its processes: "fork" or "spawn".
START_METHOD_VARIABLE = "VLLM_WORKER_MULTIPROC_METHOD"
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
class SyncOptions:
    """Options of one sync; names and values as in `RolloutConfig` (`mode` is its `sync_mode`)."""

    mode: str
    pause_mode: str
    kv_cache: str
    verify: str
    unchanged: bool = False
    """A self-test: the version stays, and no tensor may change."""

    def check(self) -> None:
        """Raise `PreflightError` (a `ValueError`) for a value that is not allowed."""
        one_of("mode", self.mode, SYNC_MODES)
        one_of("pause_mode", self.pause_mode, PAUSE_MODES)
        one_of("kv_cache", self.kv_cache, KV_CACHE_POLICIES)
        one_of("verify", self.verify, VERIFY_MODES)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the ranks of one torchrun job are divided, and how their engines run.

    Ranks `[0, trainers)` train; every further `tensor_parallel_size` ranks form an engine. Every rank must pass the
    same values. Raises `PreflightError` (a `ValueError`) for values that cannot work.
    """

    model: str
    """Folder of a Hugging Face model: config.json, and weights unless `load_format` is "dummy"."""
    trainers: int = 1
    tensor_parallel_size: int = 1
    colocate: bool = False
    """Engines share the trainers' GPUs: rank `trainers + i` uses the GPU of rank `i`. Set `gpu_memory_utilization` to
    the engines' share, and let them sleep (`pool.sleep`) while the trainer trains."""
    trainer_gpus: bool = True
    """False: trainer ranks use no GPU, and the first GPU of their machine belongs to the first engine. For a pool that
    receives no weights, such as a server's."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": CUDA where torch sees a GPU."""
    dtype: str = "auto"
    """Dtype of the engines; "auto": the dtype in config.json. On the wire, a weight has the dtype of what it lands in,
    or the trainer's where that is narrower."""
    max_model_len: int | None = None
    """Longest prompt plus completion, in tokens. None: the limit in config.json."""
    load_format: str = "auto"
    seed: int = 0
    enforce_eager: bool = False
    """Run the engines without torch.compile and CUDA graphs: faster to start, slower to decode."""
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int | None = None
    """Most sequences that one engine decodes at a time. None: the default of vLLM's `LLM` (1,024 on an H200).
    The tokens in a step are limited to the default of `LLM`, too (16,384), unless `engine_args` has
    `max_num_batched_tokens`: fewer leave more memory to the KV cache."""
    deterministic: bool = False
    """The same seed, model and calls in the same order give the same tokens: every request gets a seed of its own,
    prompts go to engines in turn, an engine runs one `generate` call at a time, without a prefix cache. Slower. On
    policy only: where in a request a sync falls would depend on timing."""
    openai_port: int | None = None
    """Engine i also serves vLLM's own OpenAI-compatible API at port `openai_port` + i; its requests take part in
    syncs. `pool.describe()[i].openai` is the address. 0: a free port. None: no server."""
    openai_flags: Sequence[str] = ()
    """Flags of `vllm serve` for that server: ("--tool-call-parser", "hermes", "--enable-auto-tool-choice")."""
    lora_rank: int | None = None
    """Engines keep their base weights and serve LoRA adapters of at most this rank: `job.broadcaster` then needs a
    peft model, and sends only its A and B. None: full weights; a peft model's adapter is merged into them."""
    lora_versions: int = 1
    """Adapter versions that an engine serves at a time. 1: requests in flight switch to each new version. N: they
    keep the version that they started with for N - 1 syncs, and then switch to the newest."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of vLLM's `AsyncEngineArgs`; JSON values only."""
    worker_extension_cls: str = "rollcast.rollout.worker.RollcastWorker"
    """Set a subclass to add methods to the workers. Must be importable in the engine's processes."""
    pause_mode: str = "keep"
    """What a sync does to requests in flight. "keep": they continue under the new weights. "wait": they finish first.
    "abort": the pool's requests are preempted, and new ones continue from their tokens under the new weights."""
    kv_cache: str = "kept"
    """KV cache of requests that continue across a sync. "kept": they use the blocks that the old weights computed.
    "recomputed": the new weights compute them again, and the prefix cache is emptied. Later requests never find blocks
    of older weights in the prefix cache: each sync changes its salt."""
    sync_asleep: str = "refuse"
    """What a sync does when an engine's weights are asleep: "refuse", or "wake" them first."""
    sync_mode: str = "in_place"
    """Where weights arrive. "in_place": in the live parameters, while the engine does not decode. "shadow": in spare
    GPU memory, of the size of the weights, while the engine decodes; it then pauses for one copy. (An engine that
    refuses to generate after a failed sync receives in place.)"""
    transport: str = "auto"
    """How bytes travel between GPUs. "nccl": grouped broadcasts. "ipc": workers read the trainer's memory, on one
    machine. "auto": "ipc" where trainer and worker share a GPU, which NCCL cannot join twice, and where one worker
    reads at most 4,096 messages over NVLink, which is a little faster; else "nccl"."""
    verify: str = "none"
    """How a sync verifies that the weights arrived as they were sent. "checksum" compares 64-bit hashes of every
    message, computed on both sides' devices, and first those of what several trainer ranks hold of the same parameters.
    "full" also sends everything again and compares it with what is in memory, in twice the time."""
    cpu_weights: str = "packed"
    """Layout of linear weights in CPU engines: "packed" is vLLM's own, "plain" that of CUDA engines."""
    bucket_bytes: int = 1 << 30
    """Most bytes of one grouped broadcast. Cast, strided or processed weights need two buffers of this size."""
    sync_timeout_s: float = 60.0
    """Seconds after which a sync fails, on every trainer rank."""
    trainer_timeout_s: float = 600.0
    """Seconds that trainer ranks wait for each other before a sync starts: one may still be saving a checkpoint."""
    start_timeout_s: float = 600.0
    """Seconds that an engine may take to start."""
    metrics_port: int | None = None
    """Trainer rank r serves Prometheus metrics at port `metrics_port` + r. None: `pool.metrics` still counts."""
    log_dir: str | None = None
    """Folder of the engines' logs. None: a temporary folder, named in the error if an engine dies."""

    def __post_init__(self) -> None:
        one_of("pause_mode", self.pause_mode, PAUSE_MODES)
        one_of("kv_cache", self.kv_cache, KV_CACHE_POLICIES)
        one_of("sync_asleep", self.sync_asleep, SYNC_ASLEEP)
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
            raise PreflightError("openai_flags are for the engines' own servers: set openai_port")
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
        """Return the model's config.json, with the fields of its language part where it has several."""
        path = Path(self.model, "config.json")
        if not path.is_file():
            raise PreflightError(
                f"model {self.model!r} has no config.json: pass the folder of a Hugging Face model "
                "(one that transformers' save_pretrained wrote)"
            )
        config = json.loads(path.read_text())
        return config | config.get("text_config", {})

    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the tokens that end a completion: those of generation_config.json, else of config.json."""
        path = Path(self.model, "generation_config.json")
        generation = json.loads(path.read_text()) if path.is_file() else {}
        ids = generation.get("eos_token_id", self.model_config().get("eos_token_id"))
        return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)

    def resolved_dtype(self) -> str:
        """Return the name of the torch dtype of the engines."""
        if self.dtype != "auto":
            return self.dtype
        config = self.model_config()
        return config.get("dtype") or config.get("torch_dtype") or "float32"

    def sync_options(
        self,
        *,
        mode: str | None = None,
        pause_mode: str | None = None,
        kv_cache: str | None = None,
        verify: str | None = None,
    ) -> SyncOptions:
        """Return the options of a sync: as given, or as configured where None."""
        return SyncOptions(
            mode=mode or self.sync_mode,
            pause_mode=pause_mode or self.pause_mode,
            kv_cache=kv_cache or self.kv_cache,
            verify=verify or self.verify,
        )

    def torch_dtype(self) -> torch.dtype:
        """Return `resolved_dtype` as a `torch.dtype`."""
        return getattr(torch, self.resolved_dtype())

    def resolved_max_model_len(self) -> int:
        """Return the longest prompt plus completion, in tokens. Raises `PreflightError` if the model allows less."""
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

    def has_towers(self) -> bool:
        """Return whether the model takes images or sound beside text."""
        return any(name in self.model_config() for name in ("vision_config", "audio_config"))

    def resolved_device(self) -> str:
        """Return "cpu" or "cuda"."""
        if self.device == "auto":
            return "cuda" if torch.cuda.device_count() else "cpu"
        return self.device


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `PreflightError` (a `ValueError`) unless `value` is allowed."""
    if value not in allowed:
        raise PreflightError(f"unknown {name} {value!r}, expected one of {', '.join(allowed)}")
