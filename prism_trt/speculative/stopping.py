"""When a request ends: end-of-sequence tokens, stop words, the token budget."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled"]
"""`stop`: an end-of-sequence token or a stop word; `length`: max_tokens or the context is used up."""


class Detokenizer(Protocol):
    """Incremental decoding of one sequence, never splitting a character."""

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """Turns the tokens of a request's events into text that will not be taken back.

    Text that may be the beginning of a stop word is held until it is known not to be one. The text ends before the
    stop word that is completed first (of those completed by the same character, the longest), however the tokens are
    divided over calls. End-of-sequence tokens have no text and end it too.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop_words: Collection[str] = (), eos_token_ids: Collection[int] = ()
    ) -> None:
        self._detokenizer = detokenizer
        self._stop_words = tuple(stop_words)
        self._eos = frozenset(eos_token_ids)
        self._held = ""
        self.stopped = False
        """A stop word or an end-of-sequence token was seen; further tokens are ignored."""

    def push(self, tokens: Sequence[int]) -> str:
        """Take the next tokens; return the text that is now certain."""
        if self.stopped:
            return ""
        end = next((i for i, token in enumerate(tokens) if token in self._eos), None)
        text = self._release(self._detokenizer.push(list(tokens if end is None else tokens[:end])))
        if end is not None and not self.stopped:
            text += self.flush()
        return text

    def flush(self) -> str:
        """The text still held back, to be called when the request has finished."""
        if self.stopped:
            return ""
        text = self._release(self._detokenizer.flush())
        if not self.stopped:
            text, self._held, self.stopped = text + self._held, "", True
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [(start + len(word), start) for word in self._stop_words if (start := text.find(word)) >= 0]
        if found:
            self._held, self.stopped = "", True
            return text[: min(found)[1]]
        certain = len(text) - _longest_beginning(text, self._stop_words)
        self._held = text[certain:]
        return text[:certain]


def _longest_beginning(text: str, words: tuple[str, ...]) -> int:
    """Length of the longest end of `text` with which one of `words` begins."""
    longest = 0
    for word in words:
        for length in range(min(len(word) - 1, len(text)), longest, -1):
            if text.endswith(word[:length]):
                longest = length
                break
    return longest


class StopRule:
    """Decides, for one request, how many of the tokens a round committed are kept."""

    def __init__(self, max_tokens: int, eos_token_ids: Collection[int], text: TextStream | None) -> None:
        self._left = max_tokens
        self._eos = frozenset(eos_token_ids)
        self._text = text

    def admit(self, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
        """The tokens to keep and, when the request ends with the last of them, why.

        The token that ends the request (end of sequence, or completing a stop word) is kept.
        """
        reason: FinishReason | None = None
        if len(tokens) >= self._left:
            tokens, reason = tokens[: self._left], "length"
        self._left -= len(tokens)
        if not self._eos.isdisjoint(tokens):
            tokens, reason = tokens[: 1 + next(i for i, token in enumerate(tokens) if token in self._eos)], "stop"
        if self._text is not None:
            for i, token in enumerate(tokens):
                self._text.push([token])
                if self._text.stopped:
                    return tokens[: i + 1], "stop"
        return tokens, reason
