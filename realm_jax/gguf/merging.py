"""The merge loop that byte pair encoding and SentencePiece share. Called by `bpe.py` and `sentencepiece.py`."""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import AnyStr


def merge(symbols: Sequence[AnyStr], priority: Callable[[AnyStr, AnyStr], float | None]) -> list[AnyStr]:
    """Join neighbours, best pair first and leftmost among equals, until no pair can be joined.

    priority(left, right): smaller is better; None where the two must stay apart. Time O(n log n).
    """
    parts = list(symbols)
    count = len(parts)
    following = list(range(1, count + 1))  # index of the next living part; count where there is none
    preceding = list(range(-1, count - 1))
    queue = []
    for left in range(count - 1):
        rank = priority(parts[left], parts[left + 1])
        if rank is not None:
            queue.append((rank, left, left + 1, len(parts[left]) + len(parts[left + 1])))
    heapify(queue)

    def offer(left: int, right: int) -> None:
        rank = priority(parts[left], parts[right])
        if rank is not None:
            heappush(queue, (rank, left, right, len(parts[left]) + len(parts[right])))

    while queue:
        _, left, right, size = heappop(queue)
        # Parts only grow to the right or become empty, so an equal size means that both are still as queued.
        if not parts[left] or not parts[right] or len(parts[left]) + len(parts[right]) != size:
            continue
        parts[left] += parts[right]
        parts[right] = parts[right][:0]
        after = following[left] = following[right]
        if after < count:
            preceding[after] = left
            offer(left, after)
        if preceding[left] >= 0:
            offer(preceding[left], left)
    return [part for part in parts if part]
