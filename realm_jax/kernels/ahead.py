"""What the steps of a product read ahead of time: w, as its reader says, and x, where it has few columns. Called by
`triton_matmul`, `triton_wide` and `triton_int8`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import codes, pallas
from realm_jax.kernels.assembly import chosen
from realm_jax.kernels.lanes import Codes, Lane, Reader, coordinates, places
from realm_jax.kernels.plan import ROWS, Plan, own_rows
from realm_jax.kernels.ring import Copies, Place, Ring, Slots, Token, commit, read_now, together
from realm_jax.quant.tensor import QuantizedTensor


class Ahead:
    """What steps read, put in a ring ahead of time. In the interpreter w is read when it is wanted."""

    def __init__(
        self,
        places: Callable[[jax.Array], list[list[Place | None]]],
        warps: int,
        steps: int,
        stages: int,
        most_bytes: int,
    ) -> None:
        self.places, self.steps = places, steps
        copied = [] if pallas.interpreting() else self._copied(jnp.int32(0))
        self.ring = Ring(copied, warps, stages, most_bytes) if copied else None
        self.ahead = 0 if self.ring is None else self.ring.stages - 1

    def _copied(self, step: jax.Array) -> list[Place]:
        return _there(self.places(step))

    def start(self) -> Token | None:
        """The ring, empty."""
        return self.ring and self.ring.begin()

    def begin(self) -> Token | None:
        """The ring, with all begun that `next` wants."""
        token = self.start()
        for step in range(self.ahead):
            token = commit(self.put(token, jnp.int32(step)))
        return token

    def put(self, token: Token | None, step: jax.Array) -> Token | None:
        """Begin to copy what `step` reads, if there is such a step."""
        return self.ring and self.ring.put(token, step, self._copied(step), step < self.steps)

    def take(self, token: Token | None, step: jax.Array) -> list[list[jax.Array | None]]:
        """Each list of what `step` reads, which must be there; None: was not put."""
        lists = self.places(step)
        if self.ring is None and pallas.interpreting():
            return [[place and read_now(place) for place in found] for found in lists]
        if self.ring is None:
            return lists  # None, all of them
        items = iter(self.ring.take(token, step, _there(lists)))
        return [[place and next(items) for place in found] for found in lists]

    def take_own(self, token: Token | None, step: jax.Array, item: jax.Array) -> list[list[jax.Array | None]]:
        """`take` of one item of each thread, arrays (P,); None: was not put, or this is the interpreter."""
        lists = self.places(step)
        if self.ring is None:
            return [[None for _ in found] for found in lists]
        items = iter(self.ring.take_own(token, step, _there(lists), item))
        return [[place and next(items) for place in found] for found in lists]

    def take_words(self, token: Token | None, step: jax.Array, number: int, word: jax.Array, count: int) -> jax.Array:
        """Words (P, 4) of place `number` of the last list: see `Ring.take_words`."""
        lists = self.places(step)
        if self.ring is None:
            place = lists[-1][number]
            shape = word.shape[0], 4
            at = jnp.broadcast_to(place.at[0][:, None], shape)
            item = lax.broadcasted_iota(jnp.int32, shape, 1)
            return pallas.load(place.ref.at[at, place.beyond + word[:, None] + item], mask=item < count, other=0)
        there = _there(lists)
        return self.ring.take_words(token, step, there, len(there) - len(lists[-1]) + number, word, count)

    def wait(self, token: Token | None, step: jax.Array) -> Token | None:
        """The ring, after a later step is begun and this one is there."""
        return self.ring and self.ring.wait(commit(self.put(together(token), step + self.ahead)))

    def next(self, token: Token | None, step: jax.Array) -> tuple[Token | None, list[list[jax.Array | None]]]:
        """`wait` and `take`."""
        token = self.wait(token, step)
        return token, self.take(token, step)


def _there(lists: list[list[Place | None]]) -> list[Place]:
    return [place for found in lists for place in found if place is not None]


class Rows(NamedTuple):
    """Rows g and g + 8 of a matrix, from `first` on, as the warps of a program read them, a group of four units each.

    planes, grid: see `Lane`. outputs: how many rows there are; those past the last are the last. units: of a row.
    group: in which group a warp is at a step. apart: how many rows further each warp begins than the one before it.
    whole: whether every program has as many rows as there is room for, and every step as many units.
    """

    reader: Reader
    planes: dict
    grid: jax.Array | None
    first: jax.Array
    outputs: jax.Array | int
    units: int
    warps: int
    group: Callable[[jax.Array, jax.Array], jax.Array]
    apart: int = 0
    whole: bool = False

    def lanes(self, s: jax.Array, flat: bool) -> list[Lane]:
        """Where step `s` is in either row: for items (P, 4), or `flat`, for the first of each thread (P,)."""
        shape = (32 * self.warps,) if flat else (32 * self.warps, 4)
        warp, g, t, _ = coordinates(lax.broadcasted_iota(jnp.int32, shape, 0))
        item = jnp.zeros_like(t) if flat else lax.broadcasted_iota(jnp.int32, shape, 1)
        group, rows = self.group(s, warp), [self.first + self.apart * warp + g + 8 * i for i in range(2)]
        if not self.whole:
            group = jnp.minimum(group, (self.units - 1) // 4)
            rows = [jnp.minimum(row, self.outputs - 1) for row in rows]
        return [Lane(self.planes, row, jnp.broadcast_to(group, shape), item, t, self.units, self.grid) for row in rows]

    def own(self, s: jax.Array, taken: list[list[jax.Array | None]]) -> list[Codes]:
        """Either row at step `s`, of each thread of unit t alone: arrays (P,). taken: what was copied ahead of it."""
        lanes = self.lanes(s, True)
        pairs = zip((lane._replace(item=lane.t) for lane in lanes), taken, strict=True)
        return [self.reader.read(lane._replace(taken=iter(items) if items else None)) for lane, items in pairs]

    def places(self, s: jax.Array) -> list[list[Place | None]]:
        """What can be copied ahead, for either row; the interpreter copies nothing."""
        if pallas.interpreting():
            return [[], []]
        low, high = (places(self.reader, lane) for lane in self.lanes(s, True))
        if self.whole:  # as far from each other everywhere
            high = [place and place.after_rows(8) for place in low]
        return [low, high]

    def read(self, s: jax.Array, taken: list[list[jax.Array | None]], signed: bool = False) -> list[Codes]:
        """Either row at step `s`. taken: what was copied ahead of it. signed: of `Lane`."""
        pairs = zip(self.lanes(s, False), taken, strict=True)
        lanes = [lane._replace(taken=iter(items) if items else None, signed=signed) for lane, items in pairs]
        return [self.reader.read(lane) for lane in lanes]


def operands_of(weights: Sequence[QuantizedTensor]) -> list[jax.Array]:
    """What `matrix_of` reads of weights of one format: the planes of all, and the grid of the format, if it has one."""
    reader, names = codes.READERS[weights[0].format], codes.fields(weights[0].format)
    return [w.planes[name] for w in weights for name in names] + ([jnp.asarray(reader.grid())] if reader.grid else [])


def matrix_of(
    refs: Sequence, own: Plan, format: str, outputs: tuple[int, ...], group: Callable
) -> tuple[Rows, jax.Array]:
    """The rows that a program reads, of one of several weights of a format, and of which. refs: of `operands_of`."""
    reader, names = codes.READERS[format], codes.fields(format)
    which, first, most = own_rows(outputs, own.program_rows)
    planes = refs[: len(outputs) * len(names)]
    planes = {name: chosen(tuple(planes[i :: len(names)]), which) for i, name in enumerate(names)}
    grid, apart, units = refs[-1] if reader.grid else None, ROWS if own.across else 0, reader.units(own.width)
    whole = units == 4 * own.steps * own.turns and all(count % own.program_rows == 0 for count in outputs)
    return Rows(reader, planes, grid, first, most, units, own.warps, group, apart, whole), which


def places_of_pieces(pieces_ref, s: jax.Array, blocks: int, live: int, warps: int) -> list[Place]:
    """What a step reads of x, where a tile has one or two columns that are not zero."""
    count = 4 * live  # of lanes that have them; the others have the same, for columns nobody looks at
    warp, _, _, lane = coordinates(lax.broadcasted_iota(jnp.int32, (32 * warps,), 0))
    zero, first, own = jnp.zeros_like(lane), (s * warps + warp) * blocks, lane % count
    # A lane copies an item of one of several blocks, for all that read it.
    block, many = lane // count, min(blocks, 32 // count)
    places = (zero, first + block, own, zero), (block * warps + warp) * count + own
    copies, slots = Copies(*places, block < many, f"{many} blocks"), Slots(count, warp * count + own)
    at = zero, first, own, zero
    return [Place(pieces_ref, at, 4, slots, 128 * i, () if i % many else copies) for i in range(blocks)]


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


def place_of_pairs(sums_ref, tile: jax.Array | int, s: jax.Array, live: int, warps: int) -> Place:
    """For `add_mins`, what a lane wants of the sums that are pairs."""
    count = 4 * live
    warp, _, _, lane = coordinates(lax.broadcasted_iota(jnp.int32, (32 * warps,), 0))
    has, lane = lane < count, lane % count
    at = jnp.broadcast_to(tile, lane.shape), s * warps + warp, lane, jnp.zeros_like(lane)
    slots = Slots(count, warp * count + lane, copies=has, name="columns")
    return Place(sums_ref, at, sums_ref.shape[3], slots)
