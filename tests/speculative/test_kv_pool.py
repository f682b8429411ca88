from __future__ import annotations

import pytest

from prism_trt.speculative.kv_pool import SlotPool


def test_slots_are_handed_out_once() -> None:
    pool = SlotPool(3)
    taken = [pool.acquire() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2]
    assert pool.free == 0
    with pytest.raises(IndexError):
        pool.acquire()
    pool.release(1)
    assert pool.acquire() == 1


def test_a_slot_cannot_be_released_twice() -> None:
    pool = SlotPool(2)
    slot = pool.acquire()
    pool.release(slot)
    with pytest.raises(ValueError, match="twice"):
        pool.release(slot)
