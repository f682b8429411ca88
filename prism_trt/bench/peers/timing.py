"""What every peer reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Timing:
    """One greedy answer; the first token belongs to the prefill."""

    tokens: list[int]
    prefill_seconds: float
    decode_seconds: float

    @property
    def decode_tps(self) -> float:
        """Decode tokens per second."""
        return (len(self.tokens) - 1) / self.decode_seconds


class Peer(Protocol):
    """Something that decodes greedily at batch 1."""

    name: str
    version: str

    def decode(self, prompt: list[int], tokens: int) -> Timing:
        """Decode exactly `tokens` tokens, ignoring end-of-sequence tokens."""
        ...
