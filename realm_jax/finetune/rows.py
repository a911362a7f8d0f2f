"""Token ids of documents, laid in rows of one width, and the order in which a run sees the rows. Plain numpy.

Shape suffixes: `R` rows, `T` tokens a row is trained on (a row holds T + 1: inputs and their successors).
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from realm_jax.errors import RealmError


@dataclass(frozen=True)
class Example:
    """One document: its token ids, and for each whether the model is to learn to say it (never the first)."""

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]

    def cut(self, start: int, stop: int) -> "Example":
        """Tokens start..stop; what comes first there has nothing before it and is not learned."""
        learned = self.learned[start:stop]
        return Example(self.tokens[start:stop], (False, *learned[1:]))


@dataclass(frozen=True, eq=False)
class Rows:
    """Documents in rows, padded on the right.

    tokens_RT: int32 (R, T + 1). learned_RT: bool (R, T + 1), the tokens whose prediction counts. first_RT: int32
    (R, T + 1), the place where the document of each token begins; a token of the padding is a document of its own.
    count_R: int32 (R,), tokens that are no padding.
    """

    tokens_RT: np.ndarray
    learned_RT: np.ndarray
    first_RT: np.ndarray
    count_R: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens_RT)

    def take(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens, learned and first of some rows."""
        return self.tokens_RT[index], self.learned_RT[index], self.first_RT[index]


def make_rows(examples: Sequence[Example], row_tokens: int, *, pack: bool = True) -> Rows:
    """Rows of `row_tokens` + 1 ids that hold the examples, of which none may be longer.

    pack: an example goes to the row where the least room is left after it, an example alone to one of its own
    otherwise. Raises RealmError where there is nothing to learn from.
    """
    width = row_tokens + 1
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for example in examples:
        size = len(example.tokens)
        place = bisect.bisect_left(room, (size, -1)) if pack else len(room)
        left, row = room.pop(place) if place < len(room) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        if pack:
            bisect.insort(room, (left - size, row))
    if not rows:
        raise RealmError("there is nothing to learn from: no document has a token to predict")
    return _laid_out(rows, width)


def _laid_out(rows: list[list[Example]], width: int) -> Rows:
    tokens = np.zeros((len(rows), width), np.int32)
    learned = np.zeros((len(rows), width), bool)
    first = np.tile(np.arange(width, dtype=np.int32), (len(rows), 1))
    count = np.zeros(len(rows), np.int32)
    for i, row in enumerate(rows):
        for example in row:
            start, stop = count[i], count[i] + len(example.tokens)
            tokens[i, start:stop] = example.tokens
            learned[i, start:stop] = example.learned
            first[i, start:stop] = start
            count[i] = stop
    return Rows(tokens, learned, first, count)


class Order:
    """Which rows each step takes: the rows in one random order after another, cut into batches without regard to where
    an order ends. A function of seed and step alone, so a run goes on anywhere.
    """

    def __init__(self, rows: int, batch: int, key: jax.Array):
        self._rows, self._batch, self._key = rows, batch, key
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def __call__(self, step: int) -> np.ndarray:
        """Rows of one step, (batch,)."""
        places = range(step * self._batch, (step + 1) * self._batch)
        return np.array([self._permutation(place // self._rows)[place % self._rows] for place in places])

    def _permute(self, epoch: int) -> np.ndarray:
        return np.asarray(jax.random.permutation(jax.random.fold_in(self._key, epoch), self._rows))
