"""Everything that crosses the control plane: msgspec structs, msgpack on the wire, no pickle (every process)."""

from typing import Any, TypeVar

import msgspec

from rollcast.rollout.protocol.sampling import Completion, Piece, Sampling


class Generate(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Sample from a prompt. Answered by `Generated`; with `stream`, by any number of `Piece` before."""

    request_id: str
    prompt: list[int]
    sampling: Sampling
    priority: int = 0
    """Requests with lower numbers run first."""
    stream: bool = False
    batch: str = ""
    """Runs together with the others of its batch, after `RunBatch`. Empty: at once."""


class RunBatch(msgspec.Struct, frozen=True, tag=True):
    """All requests of this batch are there: run them. Answered by `Done` when they are over."""

    batch: str


class Generated(msgspec.Struct, frozen=True, tag=True):
    """`Sampling.n` completions."""

    group: list[Completion]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End requests with what they have. Answered by `Done`; they themselves by `Generated`."""

    request_ids: list[str]


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Find where every parameter lands, in every worker. Answered by `Prepared`."""

    manifest: bytes


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """Every worker has its landing plan."""

    digests: list[str]
    """Of each worker's plan."""


class DescribeLanding(msgspec.Struct, frozen=True, tag=True):
    """Ask for the landing plan of each worker. Answered by `LandingPlans`."""


class LandingPlans(msgspec.Struct, frozen=True, tag=True):
    """`LandingPlan.to_bytes()` of each worker."""

    plans: list[bytes]


class Assignment(msgspec.Struct, frozen=True, array_like=True):
    """One worker's place in its lane."""

    lane: int
    rank: int
    """In the lane's group; its sender is rank 0."""
    size: int
    sender: int
    """Trainer rank."""
    digest: str
    """Of the lane's buckets. A worker whose own differ refuses."""
    transport: str
    label: str
    """Who the worker is, for errors."""


class JoinGroup(msgspec.Struct, frozen=True, tag=True):
    """Join the lanes' groups with every worker of the engine. Answered by `Done`."""

    address: str
    assignments: list[Assignment]
    """Of each worker."""
    walk: list[int]
    """Parameters in the order of the wire."""
    bucket_bytes: int
    timeout_s: float


class Receive(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Receive one sync in every worker, to be switched to at `Commit`. Answered by `Received`."""

    version: int
    digests: list[str]
    """Of each worker's lane."""
    first_rank: int
    """Number of the engine's first worker among those of all engines, from 1."""
    mode: str
    """"in_place": receive into the live weights; the engine is torn until `Commit`. "shadow": receive
    into spare memory while the engine decodes."""
    pause_mode: str
    prefix_cache: str
    kv_cache: str
    verify: str
    unchanged: bool
    """A self-test: the version stays, and no tensor may change."""
    alone: bool
    """No other engine takes part: commit without being told to."""
    timeout_s: float


class WorkerTimes(msgspec.Struct, frozen=True):
    """One worker's seconds by phase."""

    rank: int
    """Among those of all engines, from 1."""
    phases_s: dict[str, float]


class Received(msgspec.Struct, frozen=True, tag=True):
    """All workers of the engine have the weights."""

    workers: list[WorkerTimes]


class Commit(msgspec.Struct, frozen=True, tag=True):
    """Every engine has the weights: treat the prefix cache, set the version, go on. Answered by `Done`."""

    version: int
    timeout_s: float


class Abandon(msgspec.Struct, frozen=True, tag=True):
    """The sync failed somewhere: serve on if the weights are untouched, refuse if they are not. Answered by `Done`."""

    text: str


class Settle(msgspec.Struct, frozen=True, tag=True):
    """Every engine has committed, and every trainer rank knows: hand out what the version makes. Answered by `Done`."""


class Describe(msgspec.Struct, frozen=True, tag=True):
    """Ask for the engine's state. Answered by `Description`."""


class Description(msgspec.Struct, frozen=True, tag=True):
    """An engine's state."""

    engine: int
    pid: int
    """Process id of the engine's service; its workers are below it."""
    version: int
    torn: str | None
    """Why the engine refuses to generate; None when it serves."""
    requests: int = 0
    """Under way, of all trainer ranks; samples of the engine's own server."""
    openai: str | None = None
    """Base URL of the engine's own OpenAI-compatible server, with `openai_port`."""


class Sleep(msgspec.Struct, frozen=True, tag=True):
    """Free the GPU's memory, as vLLM's sleep levels say. Answered by `Done`."""

    level: int


class WakeUp(msgspec.Struct, frozen=True, tag=True):
    """Take memory back: "weights", "kv_cache", or all of it. Answered by `Done`."""

    tags: list[str]


class Fingerprint(msgspec.Struct, frozen=True, tag=True):
    """Ask for a hash of every live parameter. Answered by `Fingerprints`."""


class Fingerprints(msgspec.Struct, frozen=True, tag=True):
    """For each worker of the engine: SHA-256 of the bytes of each parameter and buffer, by vLLM's name, and
    of what linears compute whose weights are packed out of sight."""

    workers: list[dict[str, str]]


class Call(msgspec.Struct, frozen=True, tag=True):
    """Call a method of `worker_extension_cls` on every worker of the engine. Answered by `Called`."""

    method: str
    args: list[Any]


class Called(msgspec.Struct, frozen=True, tag=True):
    """What the method returned, worker by worker."""

    results: list[Any]


class Done(msgspec.Struct, frozen=True, tag=True):
    """The request was carried out; there is nothing to tell."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The request failed; `text` is for the user."""

    text: str


Request = (
    Generate
    | RunBatch
    | Abort
    | Prepare
    | DescribeLanding
    | JoinGroup
    | Receive
    | Commit
    | Abandon
    | Settle
    | Describe
    | Fingerprint
    | Call
    | Sleep
    | WakeUp
)
Reply = Piece | Generated | Prepared | LandingPlans | Received | Description | Fingerprints | Called | Done | Failed


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine process is told when it starts (JSON on its standard input)."""

    engine: int
    host: str
    """Address to bind the service to."""
    device: str
    dtype: str
    model: str
    max_model_len: int
    tensor_parallel_size: int
    worker_extension_cls: str
    load_format: str
    seed: int
    eos_token_ids: tuple[int, ...]
    """Tokens that end a completion unless `Sampling.ignore_eos`."""
    enforce_eager: bool
    gpu_memory_utilization: float
    max_num_seqs: int | None
    sync_asleep: str
    deterministic: bool
    openai_port: int | None
    openai_flags: tuple[str, ...]
    lora_rank: int | None
    lora_versions: int
    engine_args: dict[str, Any]


R = TypeVar("R")


def expect(reply: Reply, kind: type[R]) -> R:
    """The reply, which must be of the given kind."""
    assert isinstance(reply, kind), reply
    return reply


def named(engine: int, text: str) -> str:
    return text if text.startswith(f"engine {engine}") else f"engine {engine}: {text}"
