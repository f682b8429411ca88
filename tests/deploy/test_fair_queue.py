from __future__ import annotations

from collections import Counter

from prism_trt.deploy.fair_queue import FairQueue


def test_first_come_first_served_within_a_user() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(4):
        queue.push("a", number)
    assert [queue.pop() for _ in range(5)] == [("a", 0), ("a", 1), ("a", 2), ("a", 3), None]
    assert len(queue) == 0


def test_a_flood_does_not_delay_others() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(100):
        queue.push("flood", number)
    for _ in range(10):
        user, _ = queue.pop() or ("", 0)
        queue.charge(user, 50)
    queue.push("late", 0)
    queue.push("late", 1)
    # Lifted to the flood's counter when it was last served, not to zero: served next, and then in turns.
    order = []
    for _ in range(4):
        user, _ = queue.pop() or ("", 0)
        queue.charge(user, 50)
        order.append(user)
    assert order == ["late", "flood", "late", "flood"]


def test_tokens_are_shared_equally_not_requests() -> None:
    queue: FairQueue[int] = FairQueue()
    served: Counter[str] = Counter()
    cost = {"long": 300, "short": 20}
    for number in range(400):
        queue.push("long", number)
        queue.push("short", number)
    for _ in range(200):
        user, _ = queue.pop() or ("", 0)
        queue.charge(user, cost[user])
        served[user] += cost[user]
    assert abs(served["long"] - served["short"]) <= 300


def test_absence_saves_nothing_up() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.push("old", 0)
    queue.push("busy", 0)
    for number in range(1, 50):
        user, _ = queue.pop() or ("", 0)
        queue.charge(user, 10)
        queue.push("busy", number)
    for number in range(20):
        queue.push("old", number)
    turns = [user for user, _ in (queue.pop() or ("", 0) for _ in range(2))]
    assert turns[0] == "old"
    assert set(queue._served) == {"old", "busy"}


def test_users_are_forgotten() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(500):
        queue.push(f"user {number}", 0)
        assert queue.pop() == (f"user {number}", 0)
        queue.charge(f"user {number}", 5)
        queue.push("steady", 0)
        assert queue.pop() == ("steady", 0)
        queue.charge("steady", 5)
    assert len(queue._served) < 10


def test_the_longest_queue_gives_way() -> None:
    queue: FairQueue[int] = FairQueue()
    assert queue.displace("a") is None
    for number in range(3):
        queue.push("a", number)
    queue.push("b", 10)
    assert queue.displace("a") is None
    assert queue.displace("c") == 2
    assert queue.displace("b") is None  # two and two would be left
    assert queue.displace("c") == 1
    assert queue.displace("c") is None
    assert [queue.pop() for _ in range(2)] == [("a", 0), ("b", 10)]


def test_remove() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.push("a", 1)
    assert not queue.remove("b", 1)
    assert not queue.remove("a", 2)
    assert queue.remove("a", 1)
    assert not queue.remove("a", 1)
    assert list(queue) == [] and queue.pop() is None
