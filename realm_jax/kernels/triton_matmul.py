"""Products by packed weights on tensor cores, for few rows (decoding, verifying, batches): a Pallas Triton kernel.

Rows of w are the rows of the tensor cores' instruction and rows of x its columns, of which it has eight at least. A
thread loads packed words straight into the places that the instruction wants, so codes are never written anywhere: a
byte masked in place is a float16 already, a subnormal one, code * 2^-24. Products are exact and sums float32. A row of
x is scaled by a power of two and takes one column where it has 16 bits, two where it is float32: what float16 holds of
it, and what that leaves, together 22 bits. A sub-block's sum is scaled in float32, so scales are never rounded.

The order in which a result is summed depends on the format and the shape of w alone: a row of x gives the same bits
whatever rows are beside it. Called by `matmul`; its readers of formats are in `codes`.

Shape key: `M` rows of x, `N` output features, `K` input features, `P` threads of a program.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import codes, fragments, pallas
from realm_jax.kernels.codes import Lane
from realm_jax.quant.tensor import QuantizedTensor

MOST_ROWS = 64
MOST_TILES = 4  # column tiles of a program; more would not fit its registers
ROWS = 16  # of w, of a program
LOW = 2.0**-11  # what the second piece of a number is scaled by


class Plan(NamedTuple):
    """The static shape of a launch.

    rows, width, outputs: M, K, N. pieces: columns that a row of x takes. warps: of a program; they take turns along a
    row, `steps` times a group of four units each. tiles: of eight columns.
    """

    rows: int
    width: int
    outputs: int
    pieces: int
    warps: int
    steps: int
    tiles: int

    @property
    def rows_of_tile(self) -> int:
        return 8 // self.pieces


class XOfTile(NamedTuple):
    """What a step reads of a column tile: pieces of each block of four units, sums of each sub-block of a unit, of
    columns 2 t and 2 t + 1. Arrays (P, 4), or functions that load them."""

    pieces: list
    sums: list


def refuses(x_shape: tuple[int, ...], w: QuantizedTensor) -> str | None:
    """Why the kernel cannot serve this call, or None if it can."""
    if not pallas.available():
        return "it needs an NVIDIA GPU from Ampere up"
    if w.format not in codes.READERS:
        return "it cannot read this format"
    rows = math.prod(x_shape[:-1])
    if not 1 <= rows <= MOST_ROWS or 0 in w.shape:
        return f"it takes 1 to {MOST_ROWS} rows, not {rows}"
    return None


def plan(rows: int, dtype: jnp.dtype, w: QuantizedTensor) -> Plan:
    """How a product is cut: warps share the groups of a row among them, each `steps` of them."""
    outputs, width = w.shape
    groups = -(-codes.READERS[w.format].units(width) // 4)
    warps = min(8 if outputs <= 8192 else 4, 1 << groups.bit_length() - 1)
    pieces = 2 if jnp.dtype(dtype).itemsize == 4 else 1
    return Plan(rows, width, outputs, pieces, warps, -(-groups // warps), -(-rows * pieces // 8))


def matmul(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    """x (..., K) @ w.T for packed weights (N, K), in the dtype of x; up to MOST_ROWS rows of x.

    Of float32 x 22 bits of every number count (fewer of one that is 2^29 times smaller than the largest of its row);
    16-bit x is exact. A row of x that is not finite gives NaN.
    """
    own = plan(math.prod(x.shape[:-1]), x.dtype, w)
    reader = codes.READERS[w.format]
    prepared = _prepare(x.reshape(own.rows, own.width), own, w.format)
    planes = {name: w.planes[name] for name in codes.fields(w.format)}
    operands = [*prepared, *planes.values(), *([] if reader.grid is None else [jnp.asarray(reader.grid())])]
    tiles = -(-own.tiles // MOST_TILES)
    y = pallas.call(
        functools.partial(_kernel, own=own, format=w.format, names=tuple(planes)),
        operands,
        pallas.Shape((own.rows, own.outputs), x.dtype),
        grid=(-(-own.outputs // ROWS), tiles),
        num_warps=own.warps,
        num_stages=1,
        name=f"matmul_{w.format}",
    )
    return y.reshape(*x.shape[:-1], own.outputs)


def _prepare(x_MK: jax.Array, own: Plan, format: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x as the kernel reads it: one launch, a program a row (and one for each row that fills up the last tile).

    pieces (tiles, blocks, 32, 4) int32: for each 32 inputs what a lane wants, as float16 pairs. sums (tiles, 8,
    sub-blocks of a unit, units) float32: of the inputs of a sub-block, times 2^-24. back (rows,) float32: what undoes
    the scaling of a row.
    """
    reader = codes.READERS[format]
    blocks = own.steps * own.warps * 4 * reader.unit // 32
    shapes = (
        pallas.Shape((own.tiles, blocks, 32, 4), jnp.int32),
        pallas.Shape((own.tiles, 8, reader.unit // reader.sub_block, own.steps * own.warps * 4), jnp.float32),
        pallas.Shape((own.tiles * own.rows_of_tile,), jnp.float32),
    )
    body = functools.partial(_prepare_kernel, own=own, sub_block=reader.sub_block if reader.offsets else 0)
    return pallas.call(
        body, [x_MK], shapes, grid=(own.tiles * own.rows_of_tile,), num_warps=8, num_stages=1, name="prepare"
    )


def _prepare_kernel(x_ref, pieces_ref, sums_ref, back_ref, *, own: Plan, sub_block: int) -> None:
    m = pallas.program_id(0)
    tile, column = m // own.rows_of_tile, m % own.rows_of_tile * own.pieces
    blocks = pieces_ref.shape[1]

    def read(k: jax.Array) -> jax.Array:
        row = jnp.broadcast_to(jnp.minimum(m, own.rows - 1), k.shape)
        inside = (k < own.width) & (m < own.rows)
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
        word = 0
        for position in range(2):
            bits = lax.bitcast_convert_type(_pieces(read(first + 2 * position) * up)[piece], jnp.uint16)
            word = word | bits.astype(jnp.int32) << (16 * position)
        lane = 4 * (column + piece) + t
        at = jnp.broadcast_to(tile, i.shape), block, lane, 2 * k + pair
        pallas.store(pieces_ref.at[at], word, mask=block < blocks)
    if sub_block:
        many = blocks * 32 // sub_block
        shape = (_power_of_two_above(many), sub_block)
        s, j = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        total = jnp.sum(read(sub_block * s + j) * up, -1) * 2.0**-24
        s = _power_of_two_iota(many)
        for piece in range(own.pieces):
            inner = sums_ref.shape[2]
            at = jnp.broadcast_to(tile, s.shape), jnp.broadcast_to(column + piece, s.shape), s % inner, s // inner
            pallas.store(sums_ref.at[at], total if piece == 0 else jnp.zeros_like(total), mask=s < many)


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


def _kernel(*refs, own: Plan, format: str, names: tuple[str, ...]) -> None:
    """One program: ROWS rows of w, all of K, up to MOST_TILES tiles of eight columns."""
    pieces_ref, sums_ref, back_ref, *plane_refs, y_ref = refs
    reader = codes.READERS[format]
    planes = dict(zip(names, plane_refs, strict=False))
    grid = plane_refs[-1] if reader.grid else None
    first_tile = pallas.program_id(1) * MOST_TILES
    tiles = min(own.tiles, MOST_TILES)
    thread, item = (lax.broadcasted_iota(jnp.int32, (32 * own.warps, 4), axis) for axis in (0, 1))
    warp, g, t, lane_id = thread // 32, thread % 32 // 4, thread % 4, thread % 32
    units = reader.units(own.width)
    top = pallas.program_id(0) * ROWS + g

    live = min(own.rows * own.pieces, 8)  # columns of a tile that are not zero
    early = tiles == 1 and reader.unit <= 64  # a step's reads fit in registers, a step before they are wanted
    blocks, subs = 4 * reader.unit // 32, reader.unit // reader.sub_block if reader.offsets else 0

    def everywhere(number: jax.Array | int) -> jax.Array:
        return jnp.broadcast_to(jnp.int32(number), thread.shape)

    def load_pieces(tile: int, block: jax.Array) -> jax.Array:
        at = everywhere(_clipped(first_tile + tile, own)), block, lane_id, item
        if live == 8:
            return pallas.load(pieces_ref.at[at])
        return pallas.load(pieces_ref.at[at], mask=g < live, other=0)

    def load_sums(tile: int, sub: int, column: int, place: jax.Array) -> jax.Array:
        if own.pieces == 2 and column:  # a second piece: its sum is in the first
            return jnp.zeros(thread.shape, jnp.float32)
        at = everywhere(_clipped(first_tile + tile, own)), 2 * t + column, everywhere(sub), 4 * place + item
        return pallas.load(sums_ref.at[at])

    def load_x(s: jax.Array, tile: int) -> XOfTile:
        place = s * own.warps + warp
        pieces = [functools.partial(load_pieces, tile, place * blocks + i) for i in range(blocks)]
        sums = [[functools.partial(load_sums, tile, sub, i, place) for i in range(2)] for sub in range(subs)]
        return XOfTile(pieces, sums)

    def lanes(s: jax.Array) -> list[Lane]:
        group = jnp.minimum(s * own.warps + warp, (units - 1) // 4)
        rows = [jnp.minimum(top + 8 * i, own.outputs - 1) for i in range(2)]
        return [Lane(planes, row, group, item, t, units, grid) for row in rows]

    def load(s: jax.Array) -> tuple:
        """What a step reads, of w and of x."""
        x = jax.tree.map(lambda get: get(), load_x(s, 0))
        return [codes.ahead(reader, lane) for lane in lanes(s)], x

    def step(s: jax.Array, carry: tuple) -> tuple:
        following, totals = carry
        if early:
            (raw, x), following = following, load(jnp.minimum(s + 1, own.steps - 1))  # while this step is computed
            xs = [jax.tree.map(lambda array: lambda: array, x)]
            own_lanes = [lane._replace(loaded=iter(items)) for lane, items in zip(lanes(s), raw, strict=True)]
        else:
            xs, own_lanes = [load_x(s, tile) for tile in range(tiles)], lanes(s)
        rows = [reader.read(lane) for lane in own_lanes]
        parts = [[_float16_pairs(word, reader.zero) for word in row.words] for row in rows]
        for unit in range(4):
            totals = add_unit(unit, rows, parts, xs, totals)
        return following, totals

    def add_unit(unit: int, rows: list, parts: list, xs: list[XOfTile], totals: tuple) -> tuple:
        per = reader.sub_block // 16
        for sub, scale in enumerate(zip(rows[0].scales, rows[1].scales, strict=True)):
            dots = [jnp.zeros(thread.shape, jnp.float32)] * tiles
            for sixteen in range(sub * per, sub * per + per):
                a = tuple(parts[row][sixteen][pair] for pair in range(2) for row in range(2))
                at = unit * (reader.unit // 16) + sixteen  # of the 16s of four units
                for tile in range(tiles):
                    dots[tile] = fragments.mma(dots[tile], a, xs[tile].pieces[at // 2](), unit, at % 2)
            scale = fragments.by_row(*scale, unit)
            totals = tuple(fragments.fma(dot, scale, total) for dot, total in zip(dots, totals, strict=True))
            if reader.offsets:
                offset = fragments.by_row(rows[0].offsets[sub], rows[1].offsets[sub], unit)
                sums = [fragments.by_column(*(get() for get in x.sums[sub]), unit) for x in xs]
                totals = tuple(fragments.fma(offset, own, total) for own, total in zip(sums, totals, strict=True))
        return totals

    zero = jnp.zeros(thread.shape, jnp.float32)
    _, totals = lax.fori_loop(0, own.steps, step, (load(jnp.int32(0)) if early else None, (zero,) * tiles))
    for tile, total in enumerate(totals):
        total = jnp.sum(total.reshape(own.warps, 32, 4), 0)
        _store(y_ref, back_ref, total, first_tile + tile, own)


def _clipped(tile: jax.Array, own: Plan) -> jax.Array:
    """Programs of the last tiles may have fewer of them: they repeat the last, and do not store it."""
    return jnp.minimum(tile, own.tiles - 1) if own.tiles > MOST_TILES else tile


def _float16_pairs(word: jax.Array, zero: int) -> tuple[jax.Array, jax.Array]:
    """Bytes 0 and 2, and 1 and 3, of a word as pairs of float16, (byte - zero) * 2^-24."""
    pairs = [(half & codes.EVEN).astype(jnp.int32) for half in (word, word >> jnp.uint32(8))]
    low, high = (fragments.subtract_halves(pair, zero) if zero else pair for pair in pairs)
    return low, high


def _store(y_ref, back_ref, total: jax.Array, tile: jax.Array, own: Plan) -> None:
    """The sums of a tile as results: pieces joined, scaling undone."""
    count = 4 // own.pieces
    lane, item = (lax.broadcasted_iota(jnp.int32, (32, count), axis) for axis in (0, 1))
    if own.pieces == 2:
        pair = lax.broadcasted_iota(jnp.int32, (32, 2, 2), 2)
        total = jnp.sum(total.reshape(32, 2, 2) * jnp.where(pair == 0, 1.0, LOW), -1)
    m = tile * own.rows_of_tile + (lane % 4 if own.pieces == 2 else 2 * (lane % 4) + item % 2)
    n = pallas.program_id(0) * ROWS + lane // 4 + 8 * (item // (count // 2))
    inside = (m < own.rows) & (n < own.outputs)
    back = pallas.load(back_ref.at[jnp.minimum(m, own.rows - 1)])
    pallas.store(y_ref.at[m, n], (total * 2.0**24 * back).astype(y_ref.dtype), mask=inside)
