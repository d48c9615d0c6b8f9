"""OpenAI's own client: chats with an engine's server, whole and as streams, and the policy versions they carry."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import openai

MESSAGES: Any = [{"role": "user", "content": "abc"}]
EXTRA_BODY = {"return_token_ids": True, "ignore_eos": True}


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A whole answer, and what its header has."""

    text: str
    finish_reason: str
    version: int
    header: str
    spans: list[list[int]]
    tokens: list[int]


@dataclass(frozen=True, kw_only=True)
class ChatEvent:
    """One event of a streamed answer."""

    version: int
    text: str
    tokens: list[int]


@dataclass(frozen=True, kw_only=True)
class ChatStream:
    """A streamed answer."""

    header: str
    events: list[ChatEvent]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)


class BrokenStream(Exception):
    """A stream ended with an error event instead of tokens."""


def whole_chat(client: openai.OpenAI, **options: Any) -> Chat:
    raw = client.chat.completions.with_raw_response.create(
        model="it", messages=MESSAGES, extra_body=EXTRA_BODY, **options
    )
    answer: Any = raw.parse()
    (choice,) = answer.choices
    return Chat(
        text=choice.message.content,
        finish_reason=choice.finish_reason,
        version=answer.policy_version,
        header=raw.headers["x-rollcast-version"],
        spans=choice.policy_spans,
        tokens=choice.token_ids,
    )


def streamed_chat(client: openai.OpenAI, **options: Any) -> ChatStream:
    """Raises `BrokenStream` if the server sends an error in the stream."""
    with client.chat.completions.with_streaming_response.create(
        model="it", messages=MESSAGES, stream=True, extra_body=EXTRA_BODY, **options
    ) as raw:
        events = [json.loads(line[6:]) for line in raw.iter_lines() if line.startswith("data: {")]
    if broken := [event for event in events if "choices" not in event]:
        raise BrokenStream(broken[0])
    return ChatStream(header=raw.headers["x-rollcast-version"], events=[chat_event(event) for event in events])


def chat_event(event: dict[str, Any]) -> ChatEvent:
    (choice,) = event["choices"]
    return ChatEvent(
        version=event["policy_version"], text=choice["delta"].get("content") or "", tokens=choice.get("token_ids") or []
    )


def refusal(call: Callable[[], Any]) -> str:
    """Status and message of the server's error answer; fails if there is none."""
    try:
        result = call()
    except openai.APIStatusError as error:
        return f"{error.status_code}: {error.message}"
    raise AssertionError(f"the server answered: {result}")


def health(client: openai.OpenAI) -> int:
    """Status of the server's /health."""
    try:
        with urllib.request.urlopen(str(client.base_url).replace("/v1/", "/health")) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
