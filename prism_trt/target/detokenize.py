"""Text of a growing token sequence, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from prism_trt.target.tokenizer import Tokenizer

_BROKEN = "\ufffd"


class DetokenizerStream:
    """Turns tokens into text deltas that never split a character.

    The text of the last few tokens is decoded with and without the new ones; the difference is new text. It is held
    back while it ends in an incomplete UTF-8 sequence.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        """First token of the window that is decoded; earlier text never changes."""
        self._sent = 0
        """Tokens whose text has been returned."""

    def push(self, ids: Sequence[int]) -> str:
        """Append tokens; the text that is certain by now and was not returned before."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith(_BROKEN):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """The rest of the text; bytes that never became a character are U+FFFD."""
        return self._advance(self._tokenizer.decode(self._ids[self._start :]))

    def _advance(self, text: str) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._sent])
        self._start, self._sent = self._sent, len(self._ids)
        return text[len(before) :]
