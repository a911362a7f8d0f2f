"""The queue of requests that no slot has been free for: by priority, then arrival, and nobody waits for ever.

Called by the engine. Pure host code.
"""

import heapq
import itertools
import operator
from collections import deque

from realm_jax.engine.request import Handle

MOST_OVERTAKEN = 64
"""Of the requests that came after it, so many at most are served before the oldest one, whatever their priority."""
_ABSENT = 64


class Waiting:
    """Handles that wait. Who leaves is taken out of both orders when its turn comes, or when most are such."""

    def __init__(self):
        self._arrivals = itertools.count()
        self._by_priority: list[tuple[int, int, Handle]] = []
        self._by_arrival: deque[Handle] = deque()
        self._members: set[int] = set()
        self._overtakers: set[int] = set()  # served, with somebody older still waiting

    def __len__(self) -> int:
        return len(self._members)

    def push(self, handle: Handle) -> None:
        """Queue up, behind those of the same priority."""
        self._members.add(id(handle))
        heapq.heappush(self._by_priority, (-operator.index(handle.request.priority), next(self._arrivals), handle))
        self._by_arrival.append(handle)

    def remove(self, handle: Handle) -> bool:
        """Take out one that is not to be served any more; False if it does not wait."""
        if id(handle) not in self._members:
            return False
        self._members.remove(id(handle))
        self._drop_absent()
        return True

    def pop(self) -> Handle | None:
        """The next to be served, or None if nobody waits."""
        if not self._members:
            return None
        handle = self._by_arrival[0] if len(self._overtakers) >= MOST_OVERTAKEN else self._by_priority[0][2]
        self._members.remove(id(handle))
        self._overtakers.add(id(handle))
        self._drop_absent()
        return handle

    def _drop_absent(self) -> None:
        """Both orders begin with somebody who waits, and hold on to few who do not."""
        if len(self._by_priority) > 2 * len(self) + _ABSENT:
            self._by_priority = [entry for entry in self._by_priority if id(entry[2]) in self._members]
            heapq.heapify(self._by_priority)
        if len(self._by_arrival) > 2 * len(self) + 2 * MOST_OVERTAKEN + _ABSENT:
            known = self._members | self._overtakers
            self._by_arrival = deque(handle for handle in self._by_arrival if id(handle) in known)
        while self._by_priority and id(self._by_priority[0][2]) not in self._members:
            heapq.heappop(self._by_priority)
        while self._by_arrival and id(self._by_arrival[0]) not in self._members:
            self._overtakers.discard(id(self._by_arrival.popleft()))
