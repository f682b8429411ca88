"""Whose request runs next, and whose gives way when too many wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2
"""What a prompt token and a generated one count, as in the source of `FairQueue`: the latter cost more."""

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Waiting requests of several users: first come, first served within a user, the least served user first.

    The virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models", section 4.1: a counter
    per user holds the tokens of their requests so far. A user who comes back is lifted to the counter of the user
    served last, so that nobody saves up a right to the whole server.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Item]] = {}
        self._served: dict[str, int] = {}
        self._floor = 0
        """Counter of the user who was served last, at that time."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[tuple[str, Item]]:
        return ((user, item) for user, items in self._waiting.items() for item in items)

    def push(self, user: str, item: Item) -> None:
        """Add a request of `user`."""
        if user not in self._waiting:
            self._waiting[user] = deque()
            self._served[user] = max(self._served.get(user, 0), self._floor)
        self._waiting[user].append(item)

    def pop(self) -> tuple[str, Item] | None:
        """Take the next request; None when nobody waits."""
        if not self._waiting:
            return None
        user = min(self._waiting, key=self._served.__getitem__)
        self._floor = self._served[user]
        item = self._waiting[user].popleft()
        self._tidy(user)
        # Users without requests who are not above the floor would be lifted to it: nothing is lost with them.
        kept = {name: served for name, served in self._served.items() if name in self._waiting or served > self._floor}
        self._served = kept | {user: self._floor}
        return user, item

    def charge(self, user: str, cost: int) -> None:
        """Count `cost` tokens, weighted, as `user`'s."""
        self._served[user] = self._served.get(user, self._floor) + cost

    def remove(self, user: str, item: Item) -> bool:
        """Take out a request; False when it does not wait any more."""
        if item not in self._waiting.get(user, ()):
            return False
        self._waiting[user].remove(item)
        self._tidy(user)
        return True

    def displace(self, user: str) -> Item | None:
        """Take out a request to make room for one of `user`; None when `user` has no better right to it.

        It is the newest of the user with most requests, as when fair queues of packets overflow (McKenney 1990,
        "Stochastic fairness queueing"), provided that this user still has as many as `user` then.
        """
        if not self._waiting:
            return None
        longest = max(self._waiting, key=lambda name: len(self._waiting[name]))
        if len(self._waiting[longest]) < len(self._waiting.get(user, ())) + 2:
            return None
        return self._waiting[longest].pop()

    def _tidy(self, user: str) -> None:
        if not self._waiting[user]:
            del self._waiting[user]
