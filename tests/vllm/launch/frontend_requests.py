"""Requests that `frontend.py` makes with OpenAI's own client, and what it keeps of the answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import openai

TURNS: Any = [
    {"role": "user", "content": "abc"},
    {"role": "assistant", "content": "ABC"},
    {"role": "user", "content": "de"},
]
ARGUMENTS: Any = {
    "type": "object",
    "properties": {"up": {"type": "boolean"}},
    "required": ["up"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": ARGUMENTS}}]
CHOSEN: Any = {"type": "function", "function": {"name": "add"}}


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One response, with its headers."""

    text: str
    finish_reason: str
    usage: int
    """The number of completion tokens that the response reports."""
    logprobs: int
    """The number of tokens that have log-probabilities."""
    version: int
    header: str
    """The version in the response's headers."""
    spans: list[tuple[int, int]]
    """Version and first token of each span."""
    tokens: list[int]


@dataclass(frozen=True, kw_only=True)
class StreamPiece:
    """One event of a stream."""

    text: str | None
    finish_reason: str | None
    version: int


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A tool call that the client asks for."""

    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class StoppedText:
    """A text up to a stop string."""

    without_stop: str
    """The text if no stop string is given."""
    stop: str
    text: str
    finish_reason: str


@dataclass(frozen=True, kw_only=True)
class PromptTokens:
    """Lengths of a prompt, without and with an argument of the chat template that writes four characters more."""

    without_argument: int
    with_argument: int


def connect(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=40)


def whole(client: openai.OpenAI, **options: Any) -> Chat:
    """Chat without streaming."""
    extra = {"return_token_ids": True} | options.pop("extra_body", {})
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=TURNS, logprobs=True, extra_body=extra, **options
    )
    answer: Any = raw.parse()
    (choice,) = answer.choices
    return Chat(
        text=choice.message.content,
        finish_reason=choice.finish_reason,
        usage=answer.usage.completion_tokens,
        logprobs=len(choice.logprobs.content),
        version=answer.policy_version,
        header=raw.headers["x-rollcast-version"],
        spans=[(version, start) for version, start in choice.policy_spans],
        tokens=choice.token_ids,
    )


def streamed(client: openai.OpenAI, **options: Any) -> list[StreamPiece]:
    """Chat with streaming."""
    pieces: Any = client.chat.completions.create(model="tiny", messages=TURNS, stream=True, **options)
    return [
        StreamPiece(
            text=piece.choices[0].delta.content,
            finish_reason=piece.choices[0].finish_reason,
            version=piece.policy_version,
        )
        for piece in pieces
    ]


def samples(client: openai.OpenAI) -> list[str]:
    """Texts of two samples, which are alike: vLLM does not take `n` with temperature 0."""
    answer = client.completions.create(model="tiny", prompt="abcd>", n=2, max_tokens=6, extra_body={"top_k": 1})
    return [choice.text for choice in answer.choices]


def tool_call(client: openai.OpenAI) -> ToolCall:
    answer: Any = client.chat.completions.create(
        model="tiny", messages=TURNS, tools=TOOLS, tool_choice=CHOSEN, max_tokens=60
    )
    (call,) = answer.choices[0].message.tool_calls
    return ToolCall(name=call.function.name, arguments=call.function.arguments)


def tool_history(client: openai.OpenAI) -> int:
    """The length of a prompt that has a tool's result."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    turns: Any = [
        TURNS[0],
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "ABC"},
    ]
    answer: Any = client.chat.completions.create(model="tiny", messages=turns, max_tokens=1)
    return answer.usage.prompt_tokens


def stop(client: openai.OpenAI) -> StoppedText:
    """Complete a prompt without a stop string, and then with two characters of the text as one."""
    options: Any = {"model": "tiny", "prompt": "abcd>", "temperature": 0.0, "max_tokens": 30}
    options["extra_body"] = {"ignore_eos": True}
    free = client.completions.create(**options).choices[0].text
    string = free[10:12]
    choice = client.completions.create(**options, stop=[string]).choices[0]
    return StoppedText(without_stop=free, stop=string, text=choice.text, finish_reason=str(choice.finish_reason))


def template_argument(client: openai.OpenAI) -> PromptTokens:
    return PromptTokens(without_argument=prompt_tokens(client), with_argument=prompt_tokens(client, ending="abcd"))


def prompt_tokens(client: openai.OpenAI, **arguments: str) -> int:
    """The length of the prompt with arguments of the chat template."""
    answer: Any = client.chat.completions.create(
        model="tiny", messages=TURNS, max_tokens=1, extra_body={"chat_template_kwargs": arguments}
    )
    return answer.usage.prompt_tokens


def top_logprobs(client: openai.OpenAI) -> list[int]:
    """The number of alternatives of each token."""
    answer: Any = client.chat.completions.create(
        model="tiny", messages=TURNS, max_tokens=4, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True}
    )
    return [len(token.top_logprobs) for token in answer.choices[0].logprobs.content]


def structured(client: openai.OpenAI) -> str:
    extra = {"structured_outputs": {"regex": "(ab|cd){6}"}}
    return client.completions.create(model="tiny", prompt="abcd>", max_tokens=30, extra_body=extra).choices[0].text


def refusal(client: openai.OpenAI, *, content: str = "a", **options: Any) -> str:
    turns: Any = [{"role": "user", "content": content}]
    return error_of(lambda: client.chat.completions.create(model="tiny", messages=turns, **options))


def error_of(call: Callable[[], Any]) -> str:
    """The server's error; empty if there is none."""
    try:
        call()
    except openai.APIStatusError as error:
        return f"{error.status_code}: {error.message}"
    return ""
