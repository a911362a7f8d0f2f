"""What the steps of a product read ahead of time: w, as its reader says, and x, where it has few columns. Called by
`triton_matmul` and `triton_int8`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import pallas
from realm_jax.kernels.lanes import coordinates
from realm_jax.kernels.ring import Place, Ring, Slots, Token, read_now


class Ahead:
    """What steps read, put in a ring ahead of time. In the interpreter w is read when it is wanted."""

    def __init__(
        self, places: Callable[[jax.Array], list[list[Place | None]]], warps: int, steps: int, stages: int
    ) -> None:
        self.places, self.steps = places, steps
        copied = [] if pallas.interpreting() else self._copied(jnp.int32(0))
        self.ring = Ring(copied, warps, stages) if copied else None
        self.ahead = 0 if self.ring is None else self.ring.stages - 1

    def _copied(self, step: jax.Array) -> list[Place]:
        return [place for found in self.places(step) for place in found if place is not None]

    def begin(self) -> Token | None:
        if self.ring is None:
            return None
        token = self.ring.begin()
        for step in range(self.ahead):
            token = self._put(token, jnp.int32(step))
        return token

    def _put(self, token: Token, step: jax.Array) -> Token:
        return self.ring.put(token, step, self._copied(step), step < self.steps)

    def next(self, token: Token | None, step: jax.Array) -> tuple[Token | None, list[list[jax.Array | None]]]:
        """Each list of what `step` reads (None: was not put), after a later step is begun."""
        if self.ring is None and pallas.interpreting():
            *rows, x = self.places(step)
            return None, [*([] for _ in rows), [place and read_now(place) for place in x]]
        if self.ring is None:
            return None, self.places(step)  # None, all of them
        token = self.ring.wait(self._put(token, step + self.ahead))
        items = iter(self.ring.take(token, step, self._copied(step)))
        return token, [[place and next(items) for place in found] for found in self.places(step)]


def places_of_pieces(pieces_ref, s: jax.Array, blocks: int, live: int, warps: int) -> list[Place]:
    """What a step reads of x, where a tile has one or two columns that are not zero."""
    count = 4 * live  # of lanes that have them; the others have the same, for columns nobody looks at
    warp, _, _, lane = coordinates(lax.broadcasted_iota(jnp.int32, (32 * warps,), 0))
    has, lane = lane < count, lane % count
    at = jnp.zeros_like(lane), (s * warps + warp) * blocks, lane, jnp.zeros_like(lane)
    slots = Slots(count, warp * count + lane, copies=has, name="columns")
    return [Place(pieces_ref, at, 4, slots, 128 * i) for i in range(blocks)]


def places_of_sums(sums_ref, s: jax.Array, live: int, pieces: int, warps: int) -> list[Place | None]:
    """Then the sums of column 0 and of column 1, for each sub-block of four units (None: they are zero)."""
    warp, _, t, lane = coordinates(lax.broadcasted_iota(jnp.int32, (32 * warps,), 0))
    zero = jnp.zeros_like(t)
    at, slots = (zero, zero, zero, 4 * (s * warps + warp)), Slots(1, warp, copies=lane == 0, name="lane 0")
    _, _, subs, units = sums_ref.shape
    found = []
    for sub in range(subs):
        for column in range(2):
            there = column * pieces < live and not (pieces == 2 and column)
            found.append(Place(sums_ref, at, 4, slots, (column * subs + sub) * units) if there else None)
    return found


def places_of_pairs(sums_ref, tile: jax.Array | int, s: jax.Array, live: int, pieces: int, warps: int) -> list[Place]:
    """For `mma_mins`, the sums of both sub-blocks of unit t in column g (of the first piece of its row)."""
    warp, g, t, lane = coordinates(lax.broadcasted_iota(jnp.int32, (32 * warps,), 0))
    has, lane, g, place = lane < 4 * live, lane % (4 * live), g % live, s * warps + warp
    at = jnp.broadcast_to(tile, t.shape), g // pieces * pieces, jnp.zeros_like(t), 4 * place + t
    slots = Slots(4 * live, warp * (4 * live) + lane, copies=has, name="columns")
    return [Place(sums_ref, at, 1, slots, sub * sums_ref.shape[-1]) for sub in range(2)]
