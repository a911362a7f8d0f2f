"""How a product by packed weights is cut into programs. Called by the kernels for few rows.

In which order a result is summed follows from the format and the shape of w: the groups of a row of w are dealt out to
a few `turns`, each is summed, and then the sums are added one after the other. Who takes a turn is another matter: a
warp each, in one program (`plan`), or a warp all of them, or a program each (`wide`).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import codes, columns, pallas
from realm_jax.kernels.lanes import Reader
from realm_jax.kernels.operand import Form, pieces_of
from realm_jax.kernels.ring import MOST_BYTES
from realm_jax.kernels.tiles import FEW_OUTPUTS, Tiles, find
from realm_jax.quant.tensor import QuantizedTensor

ROWS = 16  # of w, of a warp
MOST_ROWS = 64  # of x
LONE_OUTPUTS = 2048  # at most: 128 programs, not one for each multiprocessor of an H100
ALONE = {True: 12, False: 24}  # warps that a multiprocessor has registers for; by whether a step reads much
SEVERAL = {True: 10, False: 64}  # at most, if they take several tiles of rows one after the other: that needs more
WIDE_TILES = 2  # of columns: from so many on warps read x together
WIDE_SHAPES = (3, 8), (3, 4), (2, 8), (2, 4), (3, 2), (2, 2)  # x_stages and across; the first that fits is taken
GROUPED_SHAPES = (4, 16), (3, 16), (4, 8), (3, 8), (4, 4), (3, 4)  # likewise, where four warps multiply together
GROUPED_BYTES = 220 * 1024  # of shared memory of a program then: it may run alone


class Room(NamedTuple):
    """For how many programs each of the multiprocessors has room: of programs that take one tile of rows, and of those
    that take several, at most."""

    multiprocessors: int
    one: int
    several: int


class Plan(NamedTuple):
    """The static shape of a launch.

    rows, width, outputs: M, K, N. pieces: columns that a row of x takes. turns: in which a row is summed, `steps` times
    a group of four units each. tiles: of eight columns. program_tiles: of a program. stages: steps that a warp reads
    ahead, with the one it is at; fewer, if they do not fit. across: 0, or how many warps of a program have ROWS rows of
    w each, for all turns; then, x_stages: of `Columns`. split: whether each turn is a program of its own. grouped:
    whether four warps multiply together. room: for how many programs there is room at a time: if there are more tiles
    of ROWS rows, each takes several; None: it takes one in any case.
    """

    rows: int
    width: int
    outputs: int
    pieces: int
    turns: int
    steps: int
    tiles: int
    program_tiles: int
    stages: int
    across: int = 0
    x_stages: int = 0
    split: bool = False
    grouped: bool = False
    room: Room | None = None

    @property
    def warps(self) -> int:
        """Of a program."""
        return self.across or self.turns

    @property
    def program_rows(self) -> int:
        """Rows of w of a program."""
        return ROWS * max(self.across, 1)

    @property
    def waits(self) -> bool:
        """Whether sums of turns wait in memory for those of later ones."""
        return self.across > 0 and self.turns > 1 and not self.split

    @property
    def trips(self) -> tuple[float, ...]:
        """How often the loops of a program run, the outer one first, on average: of a launch for one of the weights."""
        if self.waits:
            return self.turns, self.steps
        of_each = tiles_of(self, (self.outputs,)) / rows_of_programs(self, (self.outputs,))
        halves = (2, self.steps / 2) if self.steps > 1 else (self.steps,)  # see `AheadOfTiles`
        return (of_each, *halves) if of_each > 1 else (self.steps,)

    def group(self, step: jax.Array, turn: jax.Array) -> jax.Array:
        """The group of four units that a turn is at."""
        return step * self.turns + turn

    def form(self, reader: Reader) -> Form:
        """What is wanted of x; the same for most formats, and then prepared once."""
        blocks = self.steps * self.turns * 4 * reader.unit // 32
        sums = (reader.unit, reader.sub_block) if reader.offsets else ()
        return Form(self.pieces, self.tiles, blocks, *sums, grouped=self.grouped)


def plan(rows: int, dtype: jnp.dtype, w: QuantizedTensor, tiles: Tiles | None = None) -> Plan:
    """How a product is cut where warps share the groups of a row among them."""
    outputs, width = w.shape
    reader = codes.READERS[w.format]
    tiles = tiles or find(w.format, outputs, width)
    groups = -(-reader.units(width) // 4)
    much, (of_all, of_one) = reader.unit > 64, pallas.shared_memory()
    needed = 2 * (step_bytes(w) * 5 / 4 + 512)  # shared memory of a warp: two steps, with what they read of x, and sums
    # Where a step reads so much, it takes many registers and much shared memory: a multiprocessor has room for ten such
    # warps, of a program too, before Hopper, for two. The fewer tiles of rows there are, the more warps each one needs.
    most_turns = 16 if not much else 8 if outputs <= LONE_OUTPUTS else 4 if outputs <= FEW_OUTPUTS else 2
    fit = max(1, int(of_one // needed)) if much else groups
    turns = min(tiles.warps, most_turns, *(1 << count.bit_length() - 1 for count in (groups, fit)))
    pieces = pieces_of(dtype)
    steps, of_x = -(-groups // turns), -(-rows * pieces // 8)
    most = 8 if reader.sub_block == 32 else 2 if reader.offsets else 4  # what its registers hold
    own = Plan(rows, width, outputs, pieces, turns, steps, of_x, min(of_x, most), tiles.stages)
    if of_x > 1 or not tiles.resident:
        return own
    several = max(1, int(min(tiles.resident, SEVERAL[much], of_all // needed)) // turns)
    return own._replace(room=Room(pallas.multiprocessors(), max(several, ALONE[much] // turns), several))


def step_bytes(w: QuantizedTensor) -> float:
    """Of w, that a warp reads in a step."""
    return 4 * codes.READERS[w.format].unit * ROWS * w.nbytes / w.size


def wide(narrow: Plan, w: QuantizedTensor, most: int) -> Plan:
    """The same sums by warps that have rows of their own and read x together, `most` of them in a program; `narrow`
    again, where that cannot be."""
    reader, grouped = codes.READERS[w.format], pallas.is_hopper()
    tiles = min(narrow.tiles, 2 if reader.offsets and reader.sub_block == 16 else 8)
    if not grouped or reader.unit > 64:  # with 16 a thread has 128 registers
        most = min(most, 8)
    for x_stages, across in GROUPED_SHAPES if grouped else WIDE_SHAPES:
        # What is put of w comes with the newest stage of x.
        stages = -(-(x_stages - 1) * columns.STAGE_INPUTS // (4 * reader.unit))
        needed = across * stages * step_bytes(w) + columns.nbytes(tiles, x_stages, reader.mins)
        needed += 512 * across * tiles if grouped else 0  # sums of turns
        fits = needed <= (GROUPED_BYTES if grouped else MOST_BYTES)
        if narrow.tiles >= WIDE_TILES and across <= most and fits:
            split = narrow.turns > 1 and narrow.outputs <= FEW_OUTPUTS
            own = {"stages": stages, "across": across, "x_stages": x_stages, "split": split, "grouped": grouped}
            return narrow._replace(program_tiles=tiles, room=None, **own)
    return narrow


def balanced(own: Plan, outputs: tuple[int, ...]) -> Plan:
    """The plan of a launch that multiplies by weights of so many outputs: fewer warps a program, if then the
    multiprocessor that has the most to do has less. The sums, and how x is wanted, are the same."""
    if not own.grouped:
        return own
    choices = [own._replace(across=across) for across in (16, 8, 4) if across <= own.across]
    return min(choices, key=lambda p: -(-math.prod(grid_of(p, outputs)) // pallas.multiprocessors()) * p.across)


def cut(rows: int, dtype: jnp.dtype, w: QuantizedTensor, tiles: Tiles | None = None) -> Plan:
    """How the product of x (rows, K) by w is cut, in either way. tiles: None, what was found best."""
    tiles = tiles or find(w.format, *w.shape)
    return wide(plan(rows, dtype, w, tiles), w, tiles.across)


def form_of(x: jax.Array, w: QuantizedTensor) -> Form:
    """In which a product by w takes x (..., K)."""
    return cut(math.prod(x.shape[:-1]), x.dtype, w).form(codes.READERS[w.format])


def grid_of(own: Plan, outputs: tuple[int, ...]) -> tuple[int, int, int]:
    """Programs of a launch, by rows of w, columns and turns."""
    return rows_of_programs(own, outputs), -(-own.tiles // own.program_tiles), own.turns if own.split else 1


def rows_of_programs(own: Plan, outputs: tuple[int, ...]) -> int:
    """Programs of a launch, by rows of w. Of several tiles each, as many as there is room for, or down to half of them,
    where else a multiprocessor would be idle for an eighth of the time more, in the last round."""
    tiles, room = tiles_of(own, outputs), own.room
    if room is None or tiles <= room.multiprocessors * room.one:
        return tiles
    spent = {n: -(-tiles // (room.multiprocessors * n)) * n for n in range(room.several, room.several // 2, -1)}
    return room.multiprocessors * next(n for n, rounds in spent.items() if 8 * rounds <= 9 * min(spent.values()))


def tiles_of(own: Plan, outputs: tuple[int, ...]) -> int:
    """Of rows of all weights of a launch."""
    return sum(-(-count // own.program_rows) for count in outputs)


def own_tiles(own: Plan, outputs: tuple[int, ...]) -> jax.Array | int:
    """How many tiles of rows a program takes: number p of P takes p, p + P, and so on. 1, if no program has more."""
    tiles, programs = tiles_of(own, outputs), rows_of_programs(own, outputs)
    if tiles <= programs:
        return 1
    return lax.div(tiles - 1 - pallas.program_id(0), jnp.int32(programs)) + 1


def ring_bytes(own: Plan, outputs: tuple[int, ...]) -> int:
    """For the ring of a program, at most: as much as leaves room for the others of a multiprocessor. How many stages
    fit changes no result."""
    programs, (of_all, of_one) = rows_of_programs(own, outputs), pallas.shared_memory()
    sums = 512 * own.warps * own.program_tiles * (2 if programs < tiles_of(own, outputs) else 1)
    if own.room is None:
        return min(MOST_BYTES, of_one - sums)
    return min(of_all // neighbours(own, outputs) - 1024, of_one) - sums


def neighbours(own: Plan, outputs: tuple[int, ...]) -> int:
    """How many programs a multiprocessor has at a time, where there is `room`."""
    return min(-(-rows_of_programs(own, outputs) // own.room.multiprocessors), own.room.one)


def own_rows(
    outputs: tuple[int, ...], program_rows: int, tile: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which of the weights a program multiplies by, from which row on, and how many rows that has. tile: of rows, of
    all; None: the number of the program."""
    tile = pallas.program_id(0) if tile is None else tile
    which, first, most = pallas.find_range(tile, [-(-n // program_rows) for n in outputs], outputs)
    return which, first * program_rows, most


def clipped(tile: jax.Array, own: Plan) -> jax.Array:
    """Programs of the last tiles may have fewer of them: they repeat the last, and do not store it."""
    return jnp.minimum(tile, own.tiles - 1)
