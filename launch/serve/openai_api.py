"""The part of OpenAI's API that the front door speaks: requests, checked, and what they mean to the pool."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rollcast.rollout import Sampling


class Strict(BaseModel):
    """Refuses what it does not know: an option that is silently dropped is a wrong answer."""

    model_config = ConfigDict(extra="forbid")


class Text(Strict):
    """One part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: str
    content: str | list[Text] | None = None
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content or ""
        return {"role": self.role, "content": parts if isinstance(parts, str) else "".join(its.text for its in parts)}


class StreamOptions(Strict):
    include_usage: bool = False


class Request(Strict):
    """What chat and plain completions have in common. Penalties may be named, but only to be nothing."""

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=-1)
    n: int = Field(1, ge=1)
    seed: int | None = None
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = 0
    user: str | None = None
    frequency_penalty: float = Field(0.0, ge=0.0, le=0.0)
    presence_penalty: float = Field(0.0, ge=0.0, le=0.0)

    def limit(self) -> int | None:
        """Most tokens that the client wants."""
        return self.max_tokens

    def sampling(self, *, room: int) -> Sampling:
        """For the pool. `room` is how many tokens there can be after the prompt."""
        return Sampling(
            max_tokens=min(self.limit() or room, room),
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_tokens=self.min_tokens,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
        )


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False

    def limit(self) -> int | None:
        """See `Request.limit`."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """`POST /v1/completions`: one prompt, as text or token ids."""

    prompt: str | list[int]
    logprobs: Literal[0] | None = None

    def limit(self) -> int | None:
        """See `Request.limit`: OpenAI's default for plain completions."""
        return self.max_tokens or 16


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """What a response says of its length."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def error(message: str, *, kind: str) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
