"""How chat and plain completions are written in OpenAI's API: the two differ in names and nesting alone."""

from dataclasses import dataclass
from typing import Any

from rollcast.rollout import Completion

# What a tokenizer writes for bytes that are only the beginning of a character.
UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Wording:
    """Of one kind of completion."""

    kind: str
    stream_kind: str
    prefix: str
    """Of ids."""
    chat: bool

    def text(self, tokenizer: Any, token_ids: list[int], *, whole: bool = True) -> str:
        """The tokens' text; unless it is `whole`, without a last character that more tokens may still make."""
        text = str(tokenizer.decode(token_ids, skip_special_tokens=True))
        return text if whole else text.rstrip(UNFINISHED)

    def choice(self, tokenizer: Any, index: int, completion: Completion, *, logprobs: bool) -> dict[str, Any]:
        """One completion of a response."""
        text = self.text(tokenizer, completion.token_ids)
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return content | {
            "index": index,
            "finish_reason": completion.finish_reason,
            "logprobs": self._logprobs(tokenizer, completion) if logprobs else None,
            "token_ids": completion.token_ids,
            "policy_spans": completion.spans,
        }

    def delta(self, text: str, finish_reason: str | None, *, first: bool) -> dict[str, Any]:
        """One piece of a stream."""
        role = {"role": "assistant"} if first else {}
        content = {"delta": role | {"content": text}} if self.chat else {"text": text}
        return content | {"index": 0, "finish_reason": finish_reason, "logprobs": None}

    def _logprobs(self, tokenizer: Any, completion: Completion) -> dict[str, Any]:
        tokens = [str(tokenizer.decode([token])) for token in completion.token_ids]
        if not self.chat:
            return {"tokens": tokens, "token_logprobs": completion.logprobs, "top_logprobs": None, "text_offset": []}
        pairs = zip(tokens, completion.logprobs, strict=True)
        return {
            "content": [{"token": token, "logprob": its, "bytes": None, "top_logprobs": []} for token, its in pairs]
        }


CHAT = Wording("chat.completion", "chat.completion.chunk", "chatcmpl", chat=True)
PLAIN = Wording("text_completion", "text_completion", "cmpl", chat=False)
