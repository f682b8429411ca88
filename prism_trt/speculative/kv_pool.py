"""Allocation of the K/V pool's slots. The storage itself belongs to the engine."""

from __future__ import annotations

from collections import deque


class SlotPool:
    """Hands out slots 0..count-1, the longest unused one first."""

    def __init__(self, count: int) -> None:
        self._free = deque(range(count))

    @property
    def free(self) -> int:
        return len(self._free)

    def acquire(self) -> int:
        """A free slot. Raises IndexError when there is none."""
        return self._free.popleft()

    def release(self, slot: int) -> None:
        """Return a slot. Raises ValueError when it is free already."""
        if slot in self._free:
            raise ValueError(f"slot {slot} was released twice")
        self._free.append(slot)
