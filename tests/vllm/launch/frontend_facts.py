"""What `frontend.py` reports to the test that runs it."""

from dataclasses import dataclass

from frontend_requests import Chat, PromptTokens, StoppedText, StreamPiece, ToolCall


@dataclass(frozen=True, kw_only=True)
class Refusals:
    """Errors of requests that vLLM refuses."""

    no_tokens: str
    """The error for `max_tokens=0`."""
    too_long: str
    """The error for a prompt that exceeds the model's length."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Engines that answer: of a conversation that began beside another request, and of another that comes later."""

    turns: list[str]
    other: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A chat while weights change: the versions of its tokens or events, or its error."""

    versions: list[int]
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Health:
    """Status of `/health`, and whether each engine is healthy."""

    status: int
    engines: list[bool]


@dataclass(frozen=True, kw_only=True)
class Asleep:
    """What clients get before, while and after all engines sleep."""

    before: Health
    during: Health
    problem: str
    """The error of a request while they sleep."""
    after: Health
    engine_after: str
    """The engine that answers a request afterwards."""


@dataclass(frozen=True, kw_only=True)
class Disconnect:
    """Requests in the engines while a stream is read, and how soon its client's disconnect has ended it."""

    requests: int
    after_s: float


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that the clients see."""

    models: list[str]
    whole: Chat
    direct: list[Chat]
    """The same request to each engine's own server."""
    streamed: list[StreamPiece]
    samples: list[str]
    tool_call: ToolCall
    tool_history: int
    """Tokens of a prompt that has a tool's result."""
    stop: StoppedText
    template_argument: PromptTokens
    top_logprobs: list[int]
    """The number of alternatives of each token."""
    structured: str
    response: str
    refusals: Refusals
    conversation: Conversation
    without_first_engine: list[str]
    """Engines that answer if nothing listens at the first address."""
    answers: list[Answer]
    metrics: str
    asleep: Asleep
    disconnect: Disconnect
