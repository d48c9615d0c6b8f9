"""Messages between trainers, engines and workers: msgspec structs, msgpack on the wire, no pickle (all processes)."""

from typing import Any, TypeVar

import msgspec

from rollcast.comm import Box
from rollcast.comm.report import WorkerReport
from rollcast.rollout.config import RolloutConfig, SyncOptions
from rollcast.rollout.errors import Failure
from rollcast.rollout.protocol.sampling import Completion, Piece, Sampling

# What an engine that sleeps has freed, as vLLM names it.
SLEEP_TAGS = frozenset({"weights", "kv_cache"})


class Generate(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Sample from a prompt. Answered by `Generated`; with `stream`, after any number of `Piece`."""

    request_id: str
    prompt: list[int]
    sampling: Sampling
    priority: int = 0
    """Requests with lower numbers run first."""
    stream: bool = False
    batch: str = ""
    """Name of a batch that `RunBatch` runs as a whole. Empty: run at once."""


class RunBatch(msgspec.Struct, frozen=True, tag=True):
    """Run a batch, all of whose requests have been sent. Answered by `Done` when all of them are finished."""

    batch: str


class Generated(msgspec.Struct, frozen=True, tag=True):
    """`Sampling.n` completions."""

    group: list[Completion]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End requests with the tokens they have. Answered by `Done`; the requests themselves by `Generated`."""

    request_ids: list[str]


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Compile the landing plan of a manifest in every worker. Answered by `Prepared`."""

    manifest: bytes
    kept: bytes
    """`Kept.to_bytes()`: what the engine keeps as it has it."""


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """Every worker has its landing plan."""

    digests: list[str]
    """Digest of each worker's plan."""


class DescribeLanding(msgspec.Struct, frozen=True, tag=True):
    """Ask for the landing plan of each worker. Answered by `LandingPlans`."""


class LandingPlans(msgspec.Struct, frozen=True, tag=True):
    """`LandingPlan.to_bytes()` of each worker."""

    plans: list[bytes]


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """The place of one worker in one of its lanes."""

    lane: int
    rank: int
    """Rank in the lane's group, whose rank 0 is the sender."""
    size: int
    sender: int
    """Trainer rank."""
    digest: str
    """Digest of the lane's buckets. A worker whose own digest differs refuses to join."""
    boxes: dict[int, list[Box]] | None
    """What the sender sends of each parameter. None: everything."""
    bucket_bytes: int
    transport: str
    label: str
    """Name of the worker in errors."""


class JoinGroup(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Join the lanes' groups with every worker of the engine. Answered by `Done`."""

    address: str
    assignments: list[list[Assignment]]
    """One for each lane of each worker."""
    order: list[int]
    """Parameters in the order of the wire."""
    timeout_s: float


class Receive(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Receive the weights of one sync in every worker; `Commit` switches to them. Answered by `Received`."""

    version: int
    digests: list[str]
    """Digest of each worker's lanes."""
    first_rank: int
    """Rank of the engine's first worker among the workers of all engines, counted from 1."""
    options: SyncOptions
    """With mode "in_place" the live weights are partially updated until `Commit`; with "shadow" the engine decodes on,
    and the new weights wait in spare memory."""
    alone: bool
    """No other engine and no other trainer takes part: commit and finalize without further messages."""
    timeout_s: float


class ReceiveResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker returns to its engine process from its part of a `Receive` or `Commit`."""

    phases_s: dict[str, float] = {}
    """Seconds by phase, as in `WorkerReport`; empty from a switch to weights that were received before."""
    tokens: dict[str, int] = {}
    """Output tokens from the old weights by vLLM's request id; empty while the worker decodes on with those."""


class Received(msgspec.Struct, frozen=True, tag=True):
    """All workers of the engine have the weights."""

    workers: list[WorkerReport]


class Commit(msgspec.Struct, frozen=True, tag=True):
    """Switch to the received weights: every engine has them. Answered by `Done`."""

    version: int
    timeout_s: float


class Finalize(msgspec.Struct, frozen=True, tag=True):
    """Release outputs of the new version: every engine has committed, and every trainer knows. Answered by `Done`."""


class AbortSync(msgspec.Struct, frozen=True, tag=True):
    """Give up the sync, which failed somewhere. Answered by `Done`.

    The engine serves on if its weights are untouched, and refuses to generate otherwise.
    """

    reason: str


class Describe(msgspec.Struct, frozen=True, tag=True):
    """Ask for the engine's state. Answered by `Description`."""


class Description(msgspec.Struct, frozen=True, tag=True):
    """State of one engine."""

    engine: int
    pid: int
    """Process id of the engine process, the parent of its workers."""
    version: int
    """Policy version of the weights."""
    refusal: str | None
    """Why the engine refuses to generate until the next sync; None when it serves or only sleeps."""
    requests: int = 0
    """Requests in flight: those of all trainer ranks, and samples of the engine's own server."""
    openai: str | None = None
    """Base URL of the engine's own OpenAI-compatible server, with `openai_port`."""


class Sleep(msgspec.Struct, frozen=True, tag=True):
    """Free GPU memory, by vLLM's sleep levels. Answered by `Done`."""

    level: int


class WakeUp(msgspec.Struct, frozen=True, tag=True):
    """Allocate memory again: "weights", "kv_cache", or both if empty. Answered by `Done`."""

    tags: list[str]


class Fingerprint(msgspec.Struct, frozen=True, tag=True):
    """Ask for a hash of every live parameter. Answered by `Fingerprints`."""


class Fingerprints(msgspec.Struct, frozen=True, tag=True):
    """For each worker: SHA-256 of the bytes of each parameter and buffer, by vLLM's name.

    Linears whose weights are packed out of sight are hashed by what they compute.
    """

    workers: list[dict[str, str]]


class Call(msgspec.Struct, frozen=True, tag=True):
    """Call a method of `worker_extension_cls` on every worker of the engine. Answered by `Called`."""

    method: str
    args: list[Any]


class Called(msgspec.Struct, frozen=True, tag=True):
    """The method's result in each worker."""

    results: list[Any]


class Done(msgspec.Struct, frozen=True, tag=True):
    """The request was carried out."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The request failed. Becomes an `EngineError` with these failures and this message."""

    failures: list[Failure]
    message: str = ""
    """Text for the user. Empty: the failures' own texts."""


Request = (
    Generate
    | RunBatch
    | Abort
    | Prepare
    | DescribeLanding
    | JoinGroup
    | Receive
    | Commit
    | Finalize
    | AbortSync
    | Describe
    | Fingerprint
    | Call
    | Sleep
    | WakeUp
)
Reply = Piece | Generated | Prepared | LandingPlans | Received | Description | Fingerprints | Called | Done | Failed


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that an engine process needs to start (JSON on its standard input)."""

    config: RolloutConfig
    """The job's, the same for every engine."""
    engine: int
    """Index of the engine."""
    host: str
    """Address that the engine's servers listen on."""

    @property
    def openai_port(self) -> int | None:
        """Port of the engine's own OpenAI-compatible server: 0 for a free one, None for no server."""
        return self.config.openai_port and self.config.openai_port + self.engine

    @property
    def lora_slots(self) -> int:
        """Adapter versions that the engine serves at a time; 0 without LoRA."""
        return 0 if self.config.lora_rank is None else self.config.lora_versions


R = TypeVar("R")


def expect(reply: Reply, kind: type[R]) -> R:
    """Return the reply, which must be of this kind."""
    assert isinstance(reply, kind), reply
    return reply
