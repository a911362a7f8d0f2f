"""What the steps of a product read ahead of time: w, as its reader says, and x, where it has few columns. Called by
`triton_matmul`, `triton_wide` and `triton_int8`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import codes, pallas
from realm_jax.kernels.assembly import chosen
from realm_jax.kernels.lanes import Codes, Lane, Reader, coordinates, places
from realm_jax.kernels.plan import ROWS, Plan, neighbours, own_rows, own_tiles, ring_bytes, rows_of_programs
from realm_jax.kernels.results import ask_for
from realm_jax.kernels.ring import MOST_BYTES, Place, Ring, Slots, Token, commit, read_now, together

IN_FLIGHT = 44 * 1024  # bytes that a multiprocessor waits for all the time, at least, where they fit


class Ahead:
    """What steps read, put in a ring ahead of time. In the interpreter w is read when it is wanted."""

    def __init__(
        self,
        places: Callable[[jax.Array], list[list[Place | None]]],
        warps: int,
        steps: int,
        stages: int,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.places, self.steps = places, steps
        copied = [] if pallas.interpreting() else _there(places(jnp.int32(0)))
        self.ring = Ring(copied, warps, stages, most_bytes) if copied else None
        self.ahead = 0 if self.ring is None else self.ring.stages - 1

    def start(self) -> Token | None:
        """The ring, empty."""
        return self.ring and self.ring.begin()

    def put(self, token: Token | None, step: jax.Array) -> Token | None:
        """Begin to copy what `step` reads, if there is such a step."""
        return self.ring and self.ring.put(token, step, _there(self.places(step)), step < self.steps)

    def take(self, token: Token | None, step: jax.Array) -> list[list[jax.Array | None]]:
        """Each list of what `step` reads, which must be there; None: was not put."""
        return self.given(token, step, self.places(step))

    def given(self, token: Token | None, step: jax.Array, lists: list[list[Place | None]]) -> list[list]:
        """`take`, where these are the places of a step."""
        if self.ring is None and pallas.interpreting():
            return [[place and read_now(place) for place in found] for found in lists]
        if self.ring is None:
            return lists  # None, all of them
        items = iter(self.ring.take(token, step, _there(lists)))
        return [[place and next(items) for place in found] for found in lists]


class AheadOfTiles(Ahead):
    """As `Ahead`, where a program takes tiles of rows of w one after the other, or knows that it takes one. The ring
    goes on from tile to tile: while the sums of one are added up and stored, the first steps of the next are on their
    way.

    rows: number of a tile, of all of the launch -> its rows, and of which of the weights they are. beside: step -> what
    else it reads, the same in each tile. outputs: of the weights of the launch.
    """

    def __init__(
        self,
        rows: Callable[[jax.Array], tuple["Rows", jax.Array]],
        beside: Callable[[jax.Array], list[Place | None]],
        own: Plan,
        outputs: tuple[int, ...],
    ) -> None:
        self.rows_of, self.beside = rows, beside
        self.program, self.programs = pallas.program_id(0), rows_of_programs(own, outputs)
        self.count = own_tiles(own, outputs)
        self.several = not isinstance(self.count, int)
        places, most = functools.partial(self._places, self.rows(0)[0]), ring_bytes(own, outputs)
        super().__init__(places, own.warps, own.steps, min(own.stages, own.steps), most)
        if self.several and self.ring is not None:
            copied, begun = _there(places(jnp.int32(0))), self.ring.stage_bytes * neighbours(own, outputs)
            stages = max(own.stages, 2 if begun >= IN_FLIGHT else 4)
            self.ring = Ring(copied, own.warps, stages, most)
            self.ahead = self.ring.stages - 1

    def over_tiles(
        self,
        step: Callable[["Rows", jax.Array, list[list], list], list],
        finish: Callable[["Rows", jax.Array, list, jax.Array | None], list],
        zeros: list,
    ) -> None:
        """All that a program does: every step of each of its tiles adds to totals (`zeros` before the first), with what
        it reads, and then they are stored. finish: rows, of which of the weights, totals, and which tile it is, if
        there are several -> zeros, which come after the results (`results.leave`)."""

        def take_tile(number: jax.Array, state: tuple) -> tuple:
            token, totals = state
            rows, which = self.rows(number)
            token, totals = self.over_steps(number, rows, functools.partial(step, rows), token, totals)
            return token, finish(rows, which, totals, number if self.several else None)

        state = self.begin(), zeros
        if self.several:
            _, left = lax.fori_loop(0, self.count, take_tile, state)
        else:
            _, left = take_tile(jnp.int32(0), state)
        for zero in left:
            ask_for(zero)

    def rows(self, number: jax.Array | int) -> tuple["Rows", jax.Array]:
        """Of a tile of the program; see `__init__`."""
        return self.rows_of(self.program + number * self.programs if self.several else self.program)

    def _places(self, rows: "Rows", step: jax.Array) -> list[list[Place | None]]:
        return [*rows.places(step), self.beside(step)]

    def begin(self) -> Token | None:
        """The ring, with all begun that the first step of the first tile wants."""
        token = self.start()
        for place in range(self.ahead):
            tile, step = divmod(place, self.steps)
            token = self._put(token, jnp.int32(place), self.rows(tile)[0], jnp.int32(step), tile < self.count)
        return token

    def _put(self, token: Token, place: jax.Array, rows: "Rows", step: jax.Array, live: jax.Array | bool) -> Token:
        return commit(self.ring.put(token, place, _there(self._places(rows, step)), live))

    def over_steps(
        self, number: jax.Array, rows: "Rows", take: Callable[[jax.Array, list[list], Any], Any], token: Any, carry: Any
    ) -> tuple[Token | None, Any]:
        """What `take` makes of the carry in all steps of a tile, with what each reads. token: of the ring."""
        begun = number * self.steps  # its first step, of those of all tiles

        def step(s: jax.Array, state: tuple, later: "Rows", back: jax.Array | int, live: jax.Array) -> tuple:
            token, carry = state
            if self.ring is not None:
                ahead = s + self.ahead
                token = self.ring.wait(self._put(together(token), begun + ahead, later, ahead - back, live))
            return token, take(s, self.given(token, begun + s, self._places(rows, s)), carry)

        def lone_step(s: jax.Array, state: tuple) -> tuple:
            return step(s, state, rows, 0, s + self.ahead < self.steps)

        if self.ring is None or not self.several:
            return lax.fori_loop(0, self.steps, lone_step, (token, carry))

        tiles, rest = divmod(self.ahead, self.steps)

        def part(which: jax.Array, state: tuple) -> tuple:
            """Steps with which those of the same later tile are begun."""
            tile = number + tiles + which
            (later, _), live = self.rows(tile), tile < self.count
            begin, end = which * (self.steps - rest), self.steps - rest + which * rest
            body = functools.partial(step, later=later, back=(tiles + which) * self.steps, live=live)
            return lax.fori_loop(begin, end, body, state)

        if rest == 0:
            return part(jnp.int32(0), (token, carry))
        return lax.fori_loop(0, 2, part, (token, carry))


def _there(lists: list[list[Place | None]]) -> list[Place]:
    return [place for found in lists for place in found if place is not None]


class Rows(NamedTuple):
    """Rows g and g + 8 of a matrix, from `first` on, as the warps of a program read them, a group of four units each.

    planes, grid: see `Lane`. outputs: how many rows there are; those past the last are the last. units: of a row.
    group: in which group a warp is at a step. apart: how many rows further each warp begins than the one before it.
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

    def lanes(self, s: jax.Array, flat: bool) -> list[Lane]:
        """Where step `s` is in either row: for items (P, 4), or `flat`, for the first of each thread (P,)."""
        shape = (32 * self.warps,) if flat else (32 * self.warps, 4)
        warp, g, t, _ = coordinates(lax.broadcasted_iota(jnp.int32, shape, 0))
        item = jnp.zeros_like(t) if flat else lax.broadcasted_iota(jnp.int32, shape, 1)
        group = jnp.broadcast_to(jnp.minimum(self.group(s, warp), (self.units - 1) // 4), shape)
        rows = [jnp.minimum(self.first + self.apart * warp + g + 8 * i, self.outputs - 1) for i in range(2)]
        return [Lane(self.planes, row, group, item, t, self.units, self.grid) for row in rows]

    def places(self, s: jax.Array) -> list[list[Place | None]]:
        """What can be copied ahead, for either row; the interpreter copies nothing."""
        return [[] if pallas.interpreting() else places(self.reader, lane) for lane in self.lanes(s, True)]

    def read(self, s: jax.Array, taken: list[list[jax.Array | None]]) -> list[Codes]:
        """Either row at step `s`. taken: what was copied ahead of it."""
        pairs = zip(self.lanes(s, False), taken, strict=True)
        return [self.reader.read(lane._replace(taken=iter(items) if items else None)) for lane, items in pairs]


def matrix_of(
    refs: Sequence, own: Plan, format: str, outputs: tuple[int, ...], group: Callable, tile: jax.Array | None = None
) -> tuple[Rows, jax.Array]:
    """The rows that a program reads, of one of several weights of a format, and of which. refs: the planes of all, and
    the grid of the format, if it has one. tile: see `own_rows`."""
    reader, names = codes.READERS[format], codes.fields(format)
    which, first, most = own_rows(outputs, own.program_rows, tile)
    planes = refs[: len(outputs) * len(names)]
    planes = {name: chosen(tuple(planes[i :: len(names)]), which) for i, name in enumerate(names)}
    grid, apart = refs[-1] if reader.grid else None, ROWS if own.across else 0
    return Rows(reader, planes, grid, first, most, reader.units(own.width), own.warps, group, apart), which


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


def place_of_pairs(sums_ref, tile: jax.Array | int, s: jax.Array, live: int, warps: int) -> Place:
    """For `add_mins`, what a lane wants of the sums that are pairs."""
    count = 4 * live
    warp, _, _, lane = coordinates(lax.broadcasted_iota(jnp.int32, (32 * warps,), 0))
    has, lane = lane < count, lane % count
    at = jnp.broadcast_to(tile, lane.shape), s * warps + warp, lane, jnp.zeros_like(lane)
    slots = Slots(count, warp * count + lane, copies=has, name="columns")
    return Place(sums_ref, at, sums_ref.shape[3], slots)
