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


@dataclass(frozen=True)
class PassShape:
    """A forward pass over `tokens` tokens behind `context` others."""

    context: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.tokens} after {self.context}"


def pass_shapes(room: int) -> tuple[PassShape, ...]:
    """A prefill, one token, and two verifications of drafts, within a context of `room` tokens."""
    context = min(256, room // 2)
    return PassShape(0, context), *(PassShape(context, min(tokens, room - context)) for tokens in (1, 8, 16))


class Peer(Protocol):
    """Something that decodes greedily at batch 1."""

    name: str
    version: str

    def decode(self, prompt: list[int], tokens: int) -> Timing:
        """Decode exactly `tokens` tokens, ignoring end-of-sequence tokens."""
        ...

    def time_pass(self, tokens: list[int], context: int) -> float:
        """Seconds of one pass over the tokens after the first `context`, whose K/V are there.

        Logits of every token, as verification needs them; of the last alone when `context` is 0, as a prefill does.
        """
        ...
