"""How a product by packed weights is cut into programs. Called by the kernels for few rows.

In which order a result is summed follows from the format and the shape of w: the groups of a row of w are dealt out to
a few `turns`, each is summed, and then the sums are added one after the other. Who takes a turn is another matter: a
warp each, in one program (`plan`), or a warp all of them, or a program each (`wide`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from realm_jax.kernels import codes, columns, pallas
from realm_jax.kernels.lanes import Reader
from realm_jax.kernels.operand import Form, pieces_of
from realm_jax.kernels.tiles import FEW_OUTPUTS, Tiles, find
from realm_jax.quant.tensor import QuantizedTensor

ROWS = 16  # of w, of a warp
MOST_ROWS = 64  # of x
LONE_OUTPUTS = 2048  # at most: 128 programs, not one for each multiprocessor of an H100
WIDE_TILES = 2  # of columns: from so many on warps read x together
WIDE_SHAPES = (3, 8), (3, 4), (2, 8), (2, 4), (3, 2), (2, 2)  # x_stages and across; the first that fits is taken
WIDE_BYTES = 48 * 1024  # of shared memory of such a program, at most: with more, fewer run at a time
GROUPED_SHAPES = (4, 4), (3, 4)  # likewise, where four warps multiply together
GROUPED_BYTES = 112 * 1024  # two such programs share a multiprocessor


class Plan(NamedTuple):
    """The static shape of a launch.

    rows, width, outputs: M, K, N. pieces: columns that a row of x takes. turns: in which a row is summed, `steps` times
    a group of four units each. tiles: of eight columns. program_tiles: of a program. stages: steps that a warp reads
    ahead, with the one it is at; fewer, if they do not fit. across: 0, or how many warps of a program have ROWS rows of
    w each, for all turns; then, x_stages: of `Columns`. split: whether each turn is a program of its own. grouped:
    whether four warps multiply together.
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
        """Whether sums of turns wait for those of later ones."""
        return self.across > 0 and self.turns > 1 and not self.split

    @property
    def trips(self) -> tuple[int, ...]:
        """How often the loops of a program run, the outer one first."""
        return (self.turns, self.steps) if self.waits else (self.steps,)

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
    most_turns = groups
    if reader.unit > 64:
        # A step reads so much that it takes many registers and much shared memory: a multiprocessor has room for few
        # such warps, and before Hopper so has a program. The fewer rows w has, the more warps each of them needs.
        needed = 2 * (step_bytes(w) * 5 / 4 + 512)  # of a warp: two steps, with what they read of x, and sums
        fit = max(1, int(pallas.shared_memory() // needed))
        most_turns = min(groups, fit, 8 if outputs <= LONE_OUTPUTS else 4 if outputs <= FEW_OUTPUTS else 2)
    warps = 2 * tiles.warps if reader.unit > 64 and outputs <= LONE_OUTPUTS else tiles.warps
    turns = min(warps, 1 << most_turns.bit_length() - 1)
    pieces = pieces_of(dtype)
    steps, of_x = -(-groups // turns), -(-rows * pieces // 8)
    most = 8 if reader.sub_block == 32 else 2 if reader.offsets else 4  # what its registers hold
    return Plan(rows, width, outputs, pieces, turns, steps, of_x, min(of_x, most), min(tiles.stages, steps))


def step_bytes(w: QuantizedTensor) -> float:
    """Of w, that a warp reads in a step."""
    return 4 * codes.READERS[w.format].unit * ROWS * w.nbytes / w.size


def wide(narrow: Plan, w: QuantizedTensor, most: int) -> Plan:
    """The same sums by warps that have rows of their own and read x together, `most` of them in a program; `narrow`
    again, where that cannot be."""
    reader, grouped = codes.READERS[w.format], pallas.is_hopper()
    tiles = min(narrow.tiles, 2 if reader.offsets and reader.sub_block == 16 else 8)
    for x_stages, across in GROUPED_SHAPES if grouped else WIDE_SHAPES:
        # What is put of w comes with the newest stage of x.
        stages = -(-(x_stages - 1) * columns.STAGE_INPUTS // (4 * reader.unit))
        needed = across * stages * step_bytes(w) + columns.nbytes(tiles, x_stages, reader.mins)
        needed += 512 * across * tiles if grouped else 0  # sums of turns
        fits = needed <= (GROUPED_BYTES if grouped else WIDE_BYTES)
        if narrow.tiles >= WIDE_TILES and across <= most and fits:
            split = narrow.turns > 1 and narrow.outputs <= FEW_OUTPUTS
            own = {"stages": stages, "across": across, "x_stages": x_stages, "split": split, "grouped": grouped}
            return narrow._replace(program_tiles=tiles, **own)
    return narrow


def cut(rows: int, dtype: jnp.dtype, w: QuantizedTensor, tiles: Tiles | None = None) -> Plan:
    """How the product of x (rows, K) by w is cut, in either way. tiles: None, what was found best."""
    tiles = tiles or find(w.format, *w.shape)
    return wide(plan(rows, dtype, w, tiles), w, tiles.across)


def form_of(x: jax.Array, w: QuantizedTensor) -> Form:
    """In which a product by w takes x (..., K)."""
    return cut(math.prod(x.shape[:-1]), x.dtype, w).form(codes.READERS[w.format])


def together(weights: Sequence[QuantizedTensor], plans: Sequence[Plan]) -> list[list[int]]:
    """Numbers of the weights, those in one list that follow each other and that one launch can serve."""
    lists = [[0]]
    for i in range(1, len(weights)):
        if _shared(weights[i - 1], plans[i - 1]) == _shared(weights[i], plans[i]) is not None:
            lists[-1].append(i)
        else:
            lists.append([i])
    return lists


def _shared(w: QuantizedTensor, own: Plan) -> tuple | None:
    """What two weights have in common that one launch serves; None: all that a step reads of w must be copied ahead."""
    reader = codes.READERS[w.format]
    if pallas.interpreting() or not reader.copied or reader.units(own.width) % 4:
        return None
    return w.format, own._replace(outputs=0)


def grid_of(own: Plan, outputs: tuple[int, ...]) -> tuple[int, int, int]:
    """Programs of a launch, by rows of w, columns and turns."""
    programs = sum(-(-count // own.program_rows) for count in outputs)
    return programs, -(-own.tiles // own.program_tiles), own.turns if own.split else 1


def ring_bytes(warps: int, tiles: int) -> int:
    """Shared memory that a program whose warps add up their sums of so many tiles has left for what is read ahead."""
    return pallas.shared_memory() - 512 * warps * tiles


def own_rows(outputs: tuple[int, ...], program_rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which of the weights a program multiplies by, from which row on, and how many rows that has."""
    which, first, most = pallas.find_range(pallas.program_id(0), [-(-n // program_rows) for n in outputs], outputs)
    return which, first * program_rows, most


def clipped(tile: jax.Array, own: Plan) -> jax.Array:
    """Programs of the last tiles may have fewer of them: they repeat the last, and do not store it."""
    return jnp.minimum(tile, own.tiles - 1)
