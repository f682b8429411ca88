"""Answers of OpenAI's API, as JSON objects: whole ones and the events of streams."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from prism_trt.client.generate import Statistics

Endpoint = Literal["chat", "completion"]
Entry = dict[str, Any]
"""A generated token with its log-probability, as the chat API has it."""
DONE = "data: [DONE]\n\n"
_PREFIXES: dict[Endpoint, str] = {"chat": "chatcmpl-", "completion": "cmpl-"}


def event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def usage(statistics: Statistics) -> dict[str, Any]:
    """Numbers of tokens."""
    given, made = statistics.num_input_tokens, statistics.num_output_tokens
    return {
        "prompt_tokens": given,
        "completion_tokens": made,
        "total_tokens": given + made,
        "prompt_tokens_details": {"cached_tokens": statistics.num_reused_tokens},
    }


@dataclass(frozen=True)
class Answer:
    """What all parts of one answer have in common."""

    endpoint: Endpoint
    model: str
    usage_in_stream: bool
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""
    token: str = field(default_factory=lambda: secrets.token_hex(12))

    @property
    def id(self) -> str:
        """Names the answer to the client and in the log; what the server calls it begins with this."""
        return _PREFIXES[self.endpoint] + self.token

    def whole(self, text: str, log_probs: Sequence[Entry], statistics: Statistics) -> dict[str, Any]:
        """The answer in one piece."""
        body = {"message": {"role": "assistant", "content": text}} if self.endpoint == "chat" else {"text": text}
        return {
            **self._envelope("chat.completion"),
            "choices": [_choice(body, statistics.finish_reason, self._log_probs(log_probs, 0))],
            "usage": usage(statistics),
        }

    def start(self) -> list[dict[str, Any]]:
        """What comes before the first piece of a stream."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})] if self.endpoint == "chat" else []

    def piece(self, text: str, log_probs: Sequence[Entry], offset: int) -> dict[str, Any]:
        """A piece of a stream; the text of the tokens of earlier pieces has `offset` letters."""
        body: dict[str, Any] = {"delta": {"content": text}} if self.endpoint == "chat" else {"text": text}
        return self._chunk(body, log_probs=self._log_probs(log_probs, offset))

    def end(self, statistics: Statistics) -> list[dict[str, Any]]:
        """What comes after the last piece of a stream."""
        body: dict[str, Any] = {"delta": {}} if self.endpoint == "chat" else {"text": ""}
        last = [self._chunk(body, statistics.finish_reason)]
        if self.usage_in_stream:
            last.append({**self._envelope("chat.completion.chunk"), "choices": [], "usage": usage(statistics)})
        return last

    def _log_probs(self, entries: Sequence[Entry], offset: int) -> dict[str, Any] | None:
        if not entries:
            return None
        if self.endpoint == "chat":
            return {"content": list(entries), "refusal": None}
        words = [entry["token"] for entry in entries]
        # Of several tokens with the same text (parts of characters) the likeliest counts.
        tops = [{top["token"]: top["logprob"] for top in reversed(entry["top_logprobs"])} for entry in entries]
        return {
            "tokens": words,
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": tops if any(tops) else None,
            "text_offset": list(accumulate(map(len, words[:-1]), initial=offset)),
        }

    def _chunk(
        self, body: dict[str, Any], reason: str | None = None, log_probs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        # With usage asked for, it is null in all chunks but the last.
        extra = {"usage": None} if self.usage_in_stream else {}
        return {**self._envelope("chat.completion.chunk"), "choices": [_choice(body, reason, log_probs)], **extra}

    def _envelope(self, chat_object: str) -> dict[str, Any]:
        name = chat_object if self.endpoint == "chat" else "text_completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}


def _choice(body: dict[str, Any], reason: str | None, log_probs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": 0, **body, "logprobs": log_probs, "finish_reason": reason}
