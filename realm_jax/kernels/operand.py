"""The other operand of a product by packed weights: x, rearranged for the tensor cores, in a launch of its own or at
the end of the one that makes x. Called by `triton_matmul`, and by the kernels that make x; for int8 arithmetic there is
`int8_row`, whose `Records` are a form, too.

A row of x is scaled by a power of two and takes one *column* of the tensor cores' instruction where it has 16 bits, two
where it is float32: what float16 holds of it, and what that leaves, together 22 bits. Eight columns are a tile.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import pallas

LOW = 2.0**-11  # what the second piece of a number is scaled by
SUM_SCALE = 2.0**19  # float16 holds sums of a sub-block times this
MOST_PROGRAMS = 128  # of a launch, unless there are more rows: about what has a multiprocessor of its own


class Form(NamedTuple):
    """What is wanted of x. pieces: columns that a row takes, 1 or 2. tiles: of columns. blocks: of 32 inputs, zeros
    after the last. unit, sub_block: the sums of each sub-block of so many inputs, by its place in a unit of so many;
    0: those of 32 inputs, as pairs. grouped: whether four warps multiply by it together, see `place`.
    """

    pieces: int
    tiles: int
    blocks: int
    unit: int = 0
    sub_block: int = 0
    grouped: bool = False

    @property
    def rows_of_tile(self) -> int:
        return 8 // self.pieces

    @property
    def groups(self) -> int:
        """Of 256 inputs."""
        return -(-self.blocks // 8)

    @property
    def programs(self) -> int:
        """Rows of a launch: those of x, and those that fill up the last tile."""
        return self.tiles * self.rows_of_tile

    @property
    def inputs(self) -> int:
        """Of a row, with those after the last."""
        return 256 * self.groups

    def shapes(self) -> tuple[pallas.Shape, ...]:
        """Of the arrays that `write` fills."""
        return shapes(self)

    def made(self, arrays: Sequence[jax.Array]) -> "Operand":
        """These arrays, as what multiplies takes them."""
        return Operand(*arrays)

    def write(self, x: jax.Array, largest: Callable[[], jax.Array], refs: Sequence, rows: int) -> None:
        """See `write`; largest: gives it."""
        write(x, largest(), *refs, rows=rows, form=self)


class Operand(NamedTuple):
    """x as the kernel reads it.

    pieces (tiles, blocks, 32, 4) int32: for each 32 inputs float16 pairs, where `place` says. sums (tiles, 8,
    sub-blocks of a unit, units) float32: of the inputs of a sub-block, times 2^-24; or, as pairs, (tiles, groups, 32,
    3 - pieces) int32: for each 256 inputs the sums of two sub-blocks that lane 4 g + t wants of column g, number t of
    four, times SUM_SCALE, as float16, and in the next item (of second pieces: in place of it) what that leaves, 2^11
    times as large. back (rows,) float32: what undoes the scaling of a row; NaN, if any of it is not finite.
    """

    pieces: jax.Array
    sums: jax.Array
    back: jax.Array


@flax.struct.dataclass
class Prepared:
    """x (..., K) with what it is in a form, an Operand or records (`int8_row`): what `kernels.matmul` takes for x."""

    x: jax.Array
    operand: Any
    form: Any = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.x.dtype


def plain(x: jax.Array | Prepared) -> jax.Array:
    """x itself."""
    return x.x if isinstance(x, Prepared) else x


def with_operand(x: jax.Array, operand: Any, form: Any) -> jax.Array | Prepared:
    """x and what its kernel made of it, if anything."""
    return x if operand is None else Prepared(x, operand, form)


def pieces_of(dtype: jnp.dtype) -> int:
    """Columns that a row of x takes."""
    return 2 if jnp.dtype(dtype).itemsize == 4 else 1


def operand_of(x: jax.Array | Prepared, form: Form) -> Operand:
    """x (..., K), any floating point, in that form: what comes with it, or else prepared in a launch."""
    if isinstance(x, Prepared) and x.form == form:
        return x.operand
    x_MK = plain(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    part = choose_part(form)
    options = {"grid": grid(form, part), "num_warps": warps(x_MK.shape[1]), "num_stages": 1, "name": "prepare"}
    return Operand(*pallas.call(functools.partial(_prepare, form=form, part=part), [x_MK], shapes(form), **options))


def _prepare(x_ref, *refs, form: Form, part: int) -> None:
    """A part of a row, or of none."""
    rows, width = x_ref.shape
    row = own_row(rows)
    x = own_columns(form, part, width).load(x_ref, row)
    largest = largest_of([chunk.load(x_ref, row).astype(jnp.float32) for chunk in chunks(width)])
    write(x, largest, *refs, rows=rows, form=form)


def shapes(form: Form) -> tuple[pallas.Shape, ...]:
    """Of the arrays of an Operand."""
    sums = pallas.Shape((form.tiles, form.groups, 32, 3 - form.pieces), jnp.int32)
    if form.unit:
        shape = form.tiles, 8, form.unit // form.sub_block, form.blocks * 32 // form.unit
        sums = pallas.Shape(shape, jnp.float32)
    return (
        pallas.Shape((form.tiles, form.blocks, 32, 4), jnp.int32),
        sums,
        pallas.Shape((form.programs,), jnp.float32),
    )


def place(column: jax.Array, t: jax.Array, item: jax.Array, grouped: bool) -> tuple[jax.Array, jax.Array]:
    """Where in the last two axes of pieces the item stands that lane 4 column + t wants: beside its others, or, for
    warps that multiply together, beside those of the other lanes of its column: so matrices of eight columns by eight
    inputs follow each other, a column's inputs next to each other (PTX ISA, "wgmma", shared memory without swizzling).
    """
    return (8 * item + column, t) if grouped else (4 * column + t, item)


def warps(width: int) -> int:
    """Of a program with a row so wide. The order of its sums follows from it: the same for all kernels that `write`."""
    return 8 if width <= 8192 else 16


def choose_part(form: Form) -> int:
    """Inputs of a row that a program writes, a power of two. Nothing that is written depends on it.

    Four for each of its threads, or more, where rows are many: then every multiprocessor has a program anyway.
    """
    part = min(128 * warps(form.inputs), _power_of_two_above(form.inputs))
    while form.programs * -(-form.inputs // part) > MOST_PROGRAMS and part < form.inputs:
        part *= 2
    return part


def grid(form: Form, part: int) -> tuple[int, int]:
    """Of a kernel that writes parts of rows: row, part."""
    return form.programs, -(-form.inputs // part)


class Columns(NamedTuple):
    """Some inputs of a row. place: their numbers. real: which of them there are; None: all."""

    place: jax.Array
    real: jax.Array | None

    def load(self, ref, *before: jax.Array, in_order: bool = False) -> jax.Array:
        """What an array has there in its last axis; zeros beyond. in_order: the compiler leaves such loads in order."""
        other = {} if self.real is None else {"mask": self.real, "other": 0}
        return pallas.load(ref.at[(*before, self.place)], volatile=in_order, **other)


def own_row(rows: int) -> jax.Array:
    """What the program reads; the last row, where it is to fill up the last tile."""
    return jnp.minimum(pallas.program_id(0), rows - 1)


def own_columns(form: Form, part: int, width: int) -> Columns:
    """What is this program's part of a row."""
    place = pallas.program_id(1) * part + _power_of_two_iota(part)
    return Columns(place, None if part * grid(form, part)[1] <= width else place < width)


def columns(start: int, size: int, width: int) -> Columns:
    """So many inputs of a row or more, up to a power of two, from `start` on."""
    place = start + _power_of_two_iota(size)
    return Columns(place, None if start + place.size <= width else place < width)


def chunks(width: int) -> list[Columns]:
    """All of a row, in arrays of equal sizes: four inputs a thread."""
    size = min(128 * warps(width), _power_of_two_above(width))
    return [columns(start, size, width) for start in range(0, width, size)]


def store(ref, columns: Columns, x: jax.Array) -> None:
    """The program's part of a row of an array, unless it is to fill up the last tile."""
    m, real = pallas.program_id(0), columns.real
    inside = jnp.broadcast_to(m < ref.shape[0], x.shape)
    pallas.store(ref.at[m, columns.place], x, mask=inside if real is None else inside & real)


def largest_of(row: Sequence[jax.Array]) -> jax.Array:
    """Of |x|, x float32 in arrays of one size: NaN, if one of them is."""
    bits = (lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF for x in row)
    return lax.bitcast_convert_type(jnp.max(functools.reduce(jnp.maximum, bits)), jnp.float32)


def exponent(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Of a positive number rounded to dtype, biased as in float32: 255, if it is not finite."""
    return lax.bitcast_convert_type(x.astype(dtype).astype(jnp.float32), jnp.int32) >> 23


def write(x: jax.Array, largest: jax.Array, pieces_ref, sums_ref, back_ref, *, rows: int, form: Form) -> None:
    """The part of a program, one of `grid`, in the Operand of so many rows: of one row, or zeros.

    x: the inputs of the part, a power of two of at least 256; zeros after the last. largest: of the whole row's |x|,
    float32, rounded to the type of x or not yet, or what has its `exponent` in that type.
    """
    own, m, dtype = form, pallas.program_id(0), x.dtype
    tile, column = m // own.rows_of_tile, m % own.rows_of_tile * own.pieces
    start = pallas.program_id(1) * x.size
    x = jnp.where(m < rows, x.astype(jnp.float32), 0)
    biased = jnp.where(m < rows, exponent(largest, dtype), 0)
    up = _power_of_two(jnp.clip(127 + 14 + 127 - biased, 1, 254))
    back = _power_of_two(jnp.clip(127 - 14 - 127 + biased, 1, 254))
    pallas.store(back_ref.at[m], jnp.where(biased < 255, back, jnp.nan))  # all programs of a row: the same
    x *= up

    # A lane wants inputs 0 and 2, and 1 and 3, of four: as bytes of a word are masked.
    four, pair = (lax.broadcasted_iota(jnp.int32, (x.size // 4, 2), axis) for axis in range(2))
    four += start // 4
    block, k, t = four // 8, four // 4 % 2, four % 4
    for piece in range(own.pieces):
        word = _pairs(_pieces(x)[piece].reshape(x.size // 4, 2, 2))
        at = jnp.broadcast_to(tile, four.shape), block, *place(column + piece, t, 2 * k + pair, own.grouped)
        pallas.store(pieces_ref.at[at], word, mask=block < own.blocks)

    near = 16 // dtype.itemsize  # inputs that are summed first
    if not own.unit:
        halves = _pieces(_sums(x, 32, near) * 2.0**-24 * SUM_SCALE)
        words = jnp.stack([_pairs(half.reshape(half.size // 2, 2)) for half in halves], -1)
        unit, i = (lax.broadcasted_iota(jnp.int32, words.shape, axis) for axis in range(2))
        unit += start // 64
        own_column, item = (column + i, jnp.zeros_like(i)) if own.pieces == 2 else (column, i)
        at = jnp.broadcast_to(tile, i.shape), unit // 4, 4 * own_column + unit % 4, item
        pallas.store(sums_ref.at[at], words, mask=unit < 4 * own.groups)
        return
    inner = own.unit // own.sub_block
    s = start // own.sub_block + _power_of_two_iota(x.size // own.sub_block)
    total = _sums(x, own.sub_block, near) * 2.0**-24
    for piece in range(own.pieces):
        at = jnp.broadcast_to(tile, s.shape), jnp.broadcast_to(column + piece, s.shape), s % inner, s // inner
        mask = s < own.blocks * 32 // own.sub_block
        pallas.store(sums_ref.at[at], total if piece == 0 else jnp.zeros_like(total), mask=mask)


def _sums(x: jax.Array, size: int, near: int) -> jax.Array:
    """Of every `size` numbers: first neighbours, then pairs and fours of them up to `near` numbers; of these sums first
    those that are half of them apart. This order is the program's own, whatever thread has which numbers.
    """
    twos = [2] * (size.bit_length() - 1)
    x = x.reshape(x.size // size, *twos)
    for _ in range(near.bit_length() - 1):
        x = pallas.sum_of_two(x, -1)
    while x.ndim > 1:
        x = pallas.sum_of_two(x, 1)
    return x


def _pairs(halves: jax.Array) -> jax.Array:
    """Two float16 as an int32: along axis 1, which has two."""
    bits = lax.bitcast_convert_type(halves, jnp.uint16).astype(jnp.int32)
    return jnp.sum(bits << 16 * lax.broadcasted_iota(jnp.int32, bits.shape, 1), 1)


def _pieces(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What float16 holds of float32 numbers, and what that leaves, 2^11 times as large."""
    high = x.astype(jnp.float16)
    return high, ((x - high.astype(jnp.float32)) / LOW).astype(jnp.float16)


def _power_of_two(biased: jax.Array) -> jax.Array:
    """2^(biased - 127), float32."""
    return lax.bitcast_convert_type(biased << 23, jnp.float32)


def _power_of_two_above(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _power_of_two_iota(count: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, (_power_of_two_above(count),), 0)
