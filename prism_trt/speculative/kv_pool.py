"""Allocation of the K/V pool's slots, and reuse of what they hold. The storage itself belongs to the engine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_BLOCK = 64
"""Tokens compared at once."""


@dataclass(frozen=True)
class Prefix:
    """K/V that a slot holds."""

    tokens: Sequence[int] = ()
    """The sequence they were computed for; the last of them may be without K/V yet."""
    length: int = 0
    """Entries of the target: those of the first tokens."""
    drafted: int = 0
    """Entries of the drafter; entry p holds token p + 1 as well."""

    def reusable(self, prompt: Sequence[int], drafting: bool) -> int:
        """Entries from which a request with `prompt` can go on; `drafting`: in the drafter, too.

        The prompt's last token is always left to compute, because its logits and feature are stored nowhere.
        """
        common = common_length(self.tokens, prompt)
        entries = min(common, self.length, len(prompt) - 1)
        return min(entries, self.drafted, max(common - 1, 0)) if drafting else entries


@dataclass(frozen=True)
class Placement:
    """Where a request starts."""

    slot: int
    reused: int = 0
    """Entries that it need not compute."""
    donor: int | None = None
    """The slot from which they must be copied; None: they are in `slot` already."""


class SlotPool:
    """Hands out slots 0..count-1: those that hold nothing first, then the longest unused."""

    def __init__(self, count: int) -> None:
        self._idle = OrderedDict((slot, Prefix()) for slot in range(count))
        """Longest unused first."""

    @property
    def free(self) -> int:
        """Slots without a request."""
        return len(self._idle)

    @property
    def cached(self) -> int:
        """Those of them that hold the K/V of an earlier request."""
        return sum(1 for prefix in self._idle.values() if prefix.length)

    def acquire(self) -> int:
        """A free slot, whose K/V are given up. Raises IndexError when there is none."""
        slot = self._coldest()
        del self._idle[slot]
        return slot

    def place(self, prompt: Sequence[int], drafting: bool, running: Mapping[int, Prefix] | None = None) -> Placement:
        """A free slot for `prompt`, with as much of it as need not be computed.

        A slot of whose K/V at least half are those of the prompt is taken over. From any other they are copied, so that
        they stay for requests that share more of them.

        Args:
            prompt: token ids.
            drafting: the drafter's K/V are needed as well.
            running: what the slots of running requests hold; None: the engine cannot copy between slots.

        Raises:
            IndexError: no slot is free.
        """
        slot = self._coldest()
        holding = self._idle if running is None else {**self._idle, **running}
        usable = {held: prefix.reusable(prompt, drafting) for held, prefix in holding.items()}
        best = max(usable, key=usable.__getitem__)
        if best in self._idle and self._idle[best].length <= 2 * usable[best]:
            slot = best
        del self._idle[slot]
        if running is None or usable[best] <= usable[slot]:
            return Placement(slot, usable[slot])
        if best in self._idle:
            self._idle.move_to_end(best)
        return Placement(slot, usable[best], best)

    def release(self, slot: int, prefix: Prefix | None = None) -> None:
        """Return a slot that holds `prefix`, None for nothing of use. Raises ValueError when it is free already."""
        if slot in self._idle:
            raise ValueError(f"slot {slot} was released twice")
        self._idle[slot] = prefix or Prefix()

    def _coldest(self) -> int:
        if not self._idle:
            raise IndexError("no slot is free")
        return next((slot for slot, prefix in self._idle.items() if not prefix.length), next(iter(self._idle)))


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens with which both begin."""
    start = 0
    while first[start : start + _BLOCK] == second[start : start + _BLOCK] and start < len(first):
        start += _BLOCK
    for a, b in zip(first[start : start + _BLOCK], second[start : start + _BLOCK], strict=False):
        if a != b:
            break
        start += 1
    return min(start, len(first), len(second))
