from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_trt.speculative.kv_pool import Placement, Prefix, SlotPool, common_length


def holding(*prefixes: Prefix | None) -> SlotPool:
    """A pool whose slots were released in their order."""
    pool = SlotPool(len(prefixes))
    for slot in [pool.acquire() for _ in prefixes]:
        pool.release(slot, prefixes[slot])
    return pool


def whole(tokens: range | list[int]) -> Prefix:
    """What a finished request leaves: its last token has no K/V, and what it drafted last is not committed."""
    return Prefix(list(tokens), len(tokens) - 1, len(tokens) - 2)


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


def test_slots_that_hold_nothing_go_first_then_the_longest_unused() -> None:
    pool = holding(whole(range(9)), None, whole(range(5)), None)
    assert pool.cached == 2
    assert [pool.acquire() for _ in range(4)] == [1, 3, 0, 2]


@given(st.lists(st.integers(0, 1), max_size=200), st.integers(0, 200), st.lists(st.integers(0, 1), max_size=200))
def test_common_length(first: list[int], shared: int, rest: list[int]) -> None:
    second = first[:shared] + rest
    expected = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    assert common_length(first, second) == (min(len(first), len(second)) if expected is None else expected)


@pytest.mark.parametrize(
    ("prompt", "drafting", "reused"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], False, 7),  # token 7 has no K/V yet
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], True, 6),  # and draft entry 6 was not committed
        ([0, 1, 2, 3, 4], False, 4),  # the last token's logits are needed
        ([0, 1, 2, 3, 4], True, 4),
        ([0, 1, 2, 9, 9], False, 3),
        ([0, 1, 2, 9, 9], True, 2),  # draft entry 2 holds token 3
        ([9, 1, 2], True, 0),
        ([0], True, 0),
    ],
)
def test_what_can_be_reused(prompt: list[int], drafting: bool, reused: int) -> None:
    assert whole(range(8)).reusable(prompt, drafting) == reused


def test_a_slot_that_mostly_fits_is_taken_over() -> None:
    pool = holding(whole([7] * 30), whole(range(20)), None)
    assert pool.place(list(range(15)), drafting=False) == Placement(1, reused=14)
    assert pool.free == 2


def test_a_long_conversation_is_not_given_up_for_a_short_common_beginning() -> None:
    pool = holding(whole(range(100)), None)
    prompt = [*range(10), *[7] * 20]
    assert pool.place(prompt, drafting=False) == Placement(1)
    # Its entries are copied where that is possible, and it counts as used.
    pool = holding(whole(range(100)), whole([7] * 9))
    assert pool.place(prompt, drafting=False, running={}) == Placement(0, reused=10)  # would have gone anyway
    pool = holding(whole([7] * 9), whole(range(100)), whole([7] * 5))
    assert pool.place(prompt, drafting=False, running={}) == Placement(0, reused=10, donor=1)
    assert pool.place([8, 8], drafting=False, running={}) == Placement(2)


def test_running_requests_lend_what_they_have() -> None:
    pool = holding(None, None)
    slot = pool.acquire()
    running = {slot: Prefix(list(range(50)), 20, 20)}  # its prefill goes on
    assert pool.place(list(range(40)), True, running) == Placement(1, reused=20, donor=slot)
    with pytest.raises(IndexError):
        pool.place([1, 2], True, running)
