"""The queue of requests that no slot has been free for: by priority, then arrival, and nobody waits for ever.

Called by the engine. Pure host code.
"""

import heapq
import itertools
from collections import deque

from realm_jax.engine.request import Handle

MOST_OVERTAKEN = 64
"""Of the requests that came after it, so many at most are served before the oldest one, whatever their priority."""


class Waiting:
    """Handles that wait. Every operation takes logarithmic time, cancelled ones are skipped when their turn comes."""

    def __init__(self):
        self._arrivals = itertools.count()
        self._by_priority: list[tuple[int, int, Handle]] = []
        self._by_arrival: deque[tuple[int, int, Handle]] = deque()
        self._members: set[int] = set()
        self._served = 0

    def __len__(self) -> int:
        return len(self._members)

    def push(self, handle: Handle) -> None:
        """Queue up, behind those of the same priority."""
        arrival = next(self._arrivals)
        heapq.heappush(self._by_priority, (-handle.request.priority, arrival, handle))
        self._by_arrival.append((arrival, self._served + len(self), handle))
        self._members.add(id(handle))

    def remove(self, handle: Handle) -> bool:
        """Take out one that is not to be served any more; False if it does not wait."""
        if id(handle) not in self._members:
            return False
        self._members.remove(id(handle))
        # Who was ahead of somebody and leaves has in effect been served: `pop` counts who came after.
        self._served += 1
        self._drop_absent()
        return True

    def pop(self) -> Handle | None:
        """The next to be served, or None if nobody waits."""
        if not self._members:
            return None
        _, in_turn, oldest = self._by_arrival[0]
        handle = oldest if self._served - in_turn >= MOST_OVERTAKEN else self._by_priority[0][2]
        self._members.remove(id(handle))
        self._served += 1
        self._drop_absent()
        return handle

    def _drop_absent(self) -> None:
        """Both orders begin with somebody who waits."""
        while self._by_priority and id(self._by_priority[0][2]) not in self._members:
            heapq.heappop(self._by_priority)
        while self._by_arrival and id(self._by_arrival[0][2]) not in self._members:
            self._by_arrival.popleft()
