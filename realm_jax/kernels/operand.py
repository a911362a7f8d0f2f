"""The other operand of a product by packed weights: x, rearranged for the tensor cores, in a launch of its own or at
the end of the one that makes x. Called by `triton_matmul`, and by the kernels that make x.

A row of x is scaled by a power of two and takes one *column* of the tensor cores' instruction where it has 16 bits, two
where it is float32: what float16 holds of it, and what that leaves, together 22 bits. Eight columns are a tile.
"""

import functools
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import pallas

LOW = 2.0**-11  # what the second piece of a number is scaled by
SUM_SCALE = 2.0**19  # float16 holds sums of a sub-block times this


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
        """One a row, and one for each row that fills up the last tile."""
        return self.tiles * self.rows_of_tile


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
    """x (..., K) with the Operand that it is in a form: what `kernels.matmul` takes in place of x."""

    x: jax.Array
    operand: Operand
    form: Form = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.x.dtype


def plain(x: jax.Array | Prepared) -> jax.Array:
    """x itself."""
    return x.x if isinstance(x, Prepared) else x


def with_operand(x: jax.Array, operand: Operand | None, form: Form | None) -> jax.Array | Prepared:
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
    options = {"grid": (form.programs,), "num_warps": warps(x_MK.shape[1]), "num_stages": 1, "name": "prepare"}
    return Operand(*pallas.call(functools.partial(write, form=form), [x_MK], shapes(form), **options))


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


def write(x_ref, pieces_ref, sums_ref, back_ref, *, form: Form) -> None:
    """The part of a program, one of `form.programs`, in the Operand of x (M, K): of one row, or of none."""
    rows, own = x_ref.shape[0], form
    m = pallas.program_id(0)
    tile, column = m // own.rows_of_tile, m % own.rows_of_tile * own.pieces
    blocks = pieces_ref.shape[1]

    def read(k: jax.Array) -> jax.Array:
        row = jnp.broadcast_to(jnp.minimum(m, rows - 1), k.shape)
        inside = (k < x_ref.shape[1]) & (m < rows)
        return pallas.load(x_ref.at[row, k], mask=inside, other=0.0).astype(jnp.float32)

    everything = _power_of_two_iota(32 * blocks)
    x = read(everything)
    largest = jnp.max(jnp.abs(x))
    exponent = lax.bitcast_convert_type(largest, jnp.int32) >> 23
    up = _power_of_two(jnp.clip(127 + 14 + 127 - exponent, 1, 254))
    back = _power_of_two(jnp.clip(127 - 14 - 127 + exponent, 1, 254))
    broken = jnp.sum(x * 0)  # NaN, if any is not finite
    pallas.store(back_ref.at[m], back + broken)

    i = _power_of_two_iota(16 * blocks)
    block, t, k, pair = i // 16, i // 4 % 4, i // 2 % 2, i % 2
    first = 32 * block + 16 * k + 4 * t + pair  # inputs 0 and 2, and 1 and 3, of four: as bytes of a word are masked
    for piece in range(own.pieces):
        word = _pair(*(_pieces(read(first + 2 * position) * up)[piece] for position in range(2)))
        at = jnp.broadcast_to(tile, i.shape), block, *place(column + piece, t, 2 * k + pair, form.grouped)
        pallas.store(pieces_ref.at[at], word, mask=block < blocks)

    def sums(number: jax.Array, size: int) -> jax.Array:
        """Of so many inputs each, with these numbers, times 2^-24."""
        shape = (*number.shape, size)
        inputs = size * lax.broadcast_in_dim(number, shape, (0,)) + lax.broadcasted_iota(jnp.int32, shape, 1)
        return jnp.sum(read(inputs) * up, -1) * 2.0**-24

    if not own.unit:
        unit = _power_of_two_iota(4 * own.groups)
        even, odd = (_pieces(sums(2 * unit + i, 32) * SUM_SCALE) for i in range(2))
        for i in range(2):
            own_column, item = (column + i, 0) if own.pieces == 2 else (column, i)
            at = tile, unit // 4, 4 * own_column + unit % 4, item
            at = tuple(jnp.broadcast_to(index, unit.shape) for index in at)
            pallas.store(sums_ref.at[at], _pair(even[i], odd[i]), mask=unit < 4 * own.groups)
        return
    many, inner = blocks * 32 // own.sub_block, own.unit // own.sub_block
    s = _power_of_two_iota(many)
    total = sums(s, own.sub_block)
    for piece in range(own.pieces):
        at = jnp.broadcast_to(tile, s.shape), jnp.broadcast_to(column + piece, s.shape), s % inner, s // inner
        pallas.store(sums_ref.at[at], total if piece == 0 else jnp.zeros_like(total), mask=s < many)


def _pair(low: jax.Array, high: jax.Array) -> jax.Array:
    """Two float16 as an int32."""
    bits = (lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.int32) for half in (low, high))
    return next(bits) | next(bits) << 16


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
