"""Text of a growing token sequence, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from prism_trt.target.tokenizer import Tokenizer

_BROKEN = "\ufffd"


class DetokenizerStream:
    """Turns tokens into text deltas that never split a character.

    A window of the last tokens is decoded with and without the new ones; the difference is new text. The window keeps
    the tokens of the previous delta, because some tokenizers drop a space at the beginning of what they decode. Text is
    held back while it ends in an incomplete UTF-8 sequence.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0
        """Tokens of the window whose text has been returned."""

    def push(self, ids: Sequence[int]) -> str:
        """Append tokens; the text that is certain by now and was not returned before."""
        self._window += ids
        text = self._tokenizer.decode(self._window)
        return "" if text.endswith(_BROKEN) else self._advance(text)

    def flush(self) -> str:
        """The rest of the text; bytes that never became a character are U+FFFD."""
        return self._advance(self._tokenizer.decode(self._window))

    def _advance(self, text: str) -> str:
        new = text[len(self._tokenizer.decode(self._window[: self._shown])) :]
        if new:
            del self._window[: self._shown]
        self._shown = len(self._window)
        return new
