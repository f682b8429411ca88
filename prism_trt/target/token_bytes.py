"""The bytes that a single token stands for, which need not be whole characters."""

from __future__ import annotations

import re
from functools import cache

from tokenizers import Tokenizer as FastTokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Looks tokens up in a vocabulary: byte-level BPE (GPT-2), or SentencePiece with byte fallback (LLaMA)."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        self._byte_level = fast.decoder is not None and b"ByteLevel" in fast.decoder.__getstate__()
        self._added = frozenset(fast.get_added_tokens_decoder())

    def __call__(self, token: int) -> bytes:
        """The bytes of a token id; empty for an id without a token."""
        text = self._fast.id_to_token(token)
        if text is None:
            return b""
        if token in self._added:
            return text.encode()
        if self._byte_level:
            return bytes(_byte_of_letter()[letter] for letter in text)
        if found := _BYTE.fullmatch(text):
            return bytes([int(found[1], 16)])
        return text.replace("\u2581", " ").encode()


@cache
def _byte_of_letter() -> dict[str, int]:
    """The letters that stand for bytes in byte-level vocabularies (``bytes_to_unicode`` of GPT-2's encoder)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
