"""Which prompts' beginnings stand in the prefix cache: the host's index of its rows. Called by the engine."""

from collections import OrderedDict

import numpy as np

LEAST_PREFIX = 16
"""Shorter beginnings are computed again: copying a row costs about as much."""


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences (int32) begin with in common."""
    n = min(len(one), len(other))
    differ = np.flatnonzero(one[:n] != other[:n])
    return int(differ[0]) if len(differ) else n


class PrefixIndex:
    """Least recently used first. Keys and values depend on the adapter, so prefixes of different ones have nothing in
    common.
    """

    def __init__(self, rows: int):
        self._free = list(range(rows - 1, -1, -1))
        self._entries: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, adapter: int, tokens: np.ndarray) -> tuple[int, int]:
        """The row that has most in common with the beginning of `tokens`, and how many tokens; (0, 0) for none.

        What is found counts as used.
        """
        best_row, best = self._best(adapter, tokens)
        if best < LEAST_PREFIX:
            return 0, 0
        self._entries.move_to_end(best_row)
        return best_row, best

    def keep(self, adapter: int, tokens: np.ndarray) -> int | None:
        """The row to put these tokens into, which now stands for them; None if there is no need or no room."""
        if len(tokens) < LEAST_PREFIX or not (self._free or self._entries):
            return None
        if self._best(adapter, tokens)[1] == len(tokens):
            return None
        row = self._extended(adapter, tokens)
        if row is None:
            row = self._free.pop() if self._free else self._entries.popitem(last=False)[0]
        self._entries[row] = (adapter, tokens)
        self._entries.move_to_end(row)
        return row

    def _best(self, adapter: int, tokens: np.ndarray) -> tuple[int, int]:
        return max(
            ((row, common_prefix(held, tokens)) for row, (of, held) in self._entries.items() if of == adapter),
            key=lambda found: found[1],
            default=(0, 0),
        )

    def _extended(self, adapter: int, tokens: np.ndarray) -> int | None:
        """A row that holds nothing but a beginning of `tokens`: it is worth nothing beside the whole."""
        for row, (of, held) in self._entries.items():
            if of == adapter and common_prefix(held, tokens) == len(held):
                return row
        return None
