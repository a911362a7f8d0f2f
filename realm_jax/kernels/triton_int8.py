"""Products by packed weights in int8 arithmetic on tensor cores, for few rows: a Pallas Triton kernel.

As `triton_matmul`, but x is rounded to 8-bit steps as `reference.int8_steps` says, 32 inputs to a size. Codes are
unsigned bytes as they come out of a word, so nothing makes float16 of them, and a sum over a sub-block is an exact
integer (`fragments_int8`). A result is summed in an order that depends on the format and the shape of w alone: a
row of x gives the same bits whatever rows are beside it: the sub-blocks of each of the four units that a step takes are
added up by themselves, as the kernel for one row has them (`triton_int8_row`). Called by `matmul`.

Shape key: `M` rows of x, `N` output features, `K` input features, `P` threads of a program.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import codes, fragments, fragments_int8, pallas, triton_int8_row, triton_matmul
from realm_jax.kernels.ahead import Ahead, matrix_of, operands_of
from realm_jax.kernels.int8_row import Records, record_of
from realm_jax.kernels.lanes import Codes, Reader, coordinates
from realm_jax.kernels.operand import Prepared, plain
from realm_jax.kernels.plan import MOST_ROWS, Plan, clipped, grid_of, plan, ring_bytes, together
from realm_jax.kernels.reference import INT8_BLOCK
from realm_jax.kernels.results import leave
from realm_jax.kernels.ring import Place, Slots, read_now
from realm_jax.kernels.tiles import Tiles, find
from realm_jax.quant.tensor import QuantizedTensor

MOST_TILES = 4  # of columns, of a program; 2, where a unit is so large that sums of 4 tiles do not fit into registers
COLUMNS = 8  # of a tile; a row of x takes one
PREPARED = 32  # blocks of x that a program of `prepare` takes


class Form(NamedTuple):
    """What is wanted of x. tiles: of eight rows. blocks: of 32 inputs, zeros after the last. sub_block: inputs that a
    sum is over. zero, offsets, mins: see `lanes.Reader`."""

    tiles: int
    blocks: int
    sub_block: int
    zero: int
    offsets: bool
    mins: bool


class Operand(NamedTuple):
    """x as the kernel reads it.

    steps (tiles, blocks / 2, 32, 4) int32: for each 64 inputs what a lane wants, four steps in a word. sizes (tiles, 8,
    blocks) float32: of a step. sums (tiles, 8, sub-blocks) float32: of the inputs of a sub-block as they are rounded;
    without offsets, EXACT + zero times the sum of the steps, which is where products begin to count. Where the format
    has `mins`, of each 32 inputs, (tiles, blocks / 8, 32, 4) int32: as lanes want them, three words (`mma_mins`).
    """

    steps: jax.Array
    sizes: jax.Array
    sums: jax.Array


def refuses(x_shape: tuple[int, ...], w: QuantizedTensor) -> str | None:
    """Why the kernel cannot serve this call, or None if it can."""
    if not 1 <= math.prod(x_shape[:-1]) <= MOST_ROWS:
        return f"it takes 1 to {MOST_ROWS} rows, not {math.prod(x_shape[:-1])}"
    return triton_matmul.refuses(x_shape, w)


def matmul(x: jax.Array | Prepared, w: QuantizedTensor, tiles: Tiles | None = None) -> jax.Array:
    """x (..., K) @ w.T for packed weights (N, K), in the dtype of x: `reference.matmul_int8`, but for the order of
    sums; for few rows of x. tiles: None, what was found best for such weights on this device."""
    return matmul_each(x, [w], tiles)[0]


def matmul_each(
    x: jax.Array | Prepared, weights: Sequence[QuantizedTensor], tiles: Tiles | None = None
) -> list[jax.Array]:
    """`matmul` of x by each of the weights: of one row one launch for those next to each other that can share it."""
    plans = [plan_of(x.shape, w, tiles) for w in weights]
    if plans[0].rows > 1:
        return [_matmul(plain(x), w, own) for w, own in zip(weights, plans, strict=True)]
    return [
        y
        for own in together(weights, plans)
        for y in triton_int8_row.matmul_each(x, [weights[i] for i in own], plans[own[0]])
    ]


def form_of(x_shape: tuple[int, ...], weights: Sequence[QuantizedTensor]) -> Records | None:
    """In which form products of one row by these weights take x (..., K); None for more rows."""
    if math.prod(x_shape[:-1]) != 1:
        return None
    return Records(tuple(dict.fromkeys(record_of(w, plan_of(x_shape, w)) for w in weights)))


def plan_of(x_shape: tuple[int, ...], w: QuantizedTensor, tiles: Tiles | None = None) -> Plan:
    """How a product of x (..., K) by w is cut."""
    rows, most = math.prod(x_shape[:-1]), MOST_TILES if codes.READERS[w.format].unit <= 64 else MOST_TILES // 2
    own = plan(rows, jnp.bfloat16, w, tiles or find(w.format, *w.shape, "int8"))  # a column for a row of any type
    return own._replace(program_tiles=min(own.tiles, most))


def _matmul(x: jax.Array, w: QuantizedTensor, own: Plan) -> jax.Array:
    reader = codes.READERS[w.format]
    blocks = own.steps * own.warps * 4 * reader.unit // INT8_BLOCK
    form = Form(own.tiles, blocks, reader.sub_block, reader.zero, reader.offsets, reader.mins)
    prepared = prepare(x.reshape(own.rows, own.width), form)
    y = pallas.call(
        functools.partial(_kernel, own=own, format=w.format),
        [*prepared, *operands_of([w])],
        pallas.Shape((own.rows, own.outputs), x.dtype),
        grid=grid_of(own, (own.outputs,)),
        num_warps=own.warps,
        num_stages=1,
        name=f"matmul_int8_{w.format}",
    )
    return y.reshape(*x.shape[:-1], own.outputs)


# --- x ---------------------------------------------------------------------------------------------------------------


def prepare(x_MK: jax.Array, form: Form) -> Operand:
    """x (M, K), any floating point, rounded. Programs for the rows too that fill up the last tile."""
    sums = pallas.Shape((form.tiles, COLUMNS, form.blocks * INT8_BLOCK // form.sub_block), jnp.float32)
    shapes = (
        pallas.Shape((form.tiles, form.blocks // 2, 32, 4), jnp.int32),
        pallas.Shape((form.tiles, COLUMNS, form.blocks), jnp.float32),
        pallas.Shape((form.tiles, form.blocks // 8, 32, 4), jnp.int32) if form.mins else sums,
    )
    grid = form.tiles * COLUMNS, -(-form.blocks // PREPARED)
    body = functools.partial(_prepare, own=form)
    return Operand(*pallas.call(body, [x_MK], shapes, grid=grid, num_warps=4, num_stages=1, name="prepare_int8"))


def _prepare(x_ref, steps_ref, sizes_ref, sums_ref, *, own: Form) -> None:
    """PREPARED blocks of a row, as (block, half, lane, byte)."""
    m, first = pallas.program_id(0), pallas.program_id(1) * PREPARED
    shape = PREPARED, 2, 4, 4
    block, half, t, i = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(4))
    k = INT8_BLOCK * (first + block) + 16 * half + 4 * t + i
    row = jnp.broadcast_to(jnp.minimum(m, x_ref.shape[0] - 1), shape)
    inside = (k < x_ref.shape[1]) & (m < x_ref.shape[0])
    x = pallas.load(x_ref.at[row, k], mask=inside, other=0.0).astype(jnp.float32)
    steps, size = fragments_int8.steps_of(x)

    def places(shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
        tile, column = (jnp.broadcast_to(j, shape) for j in (m // COLUMNS, m % COLUMNS))
        block, *inner = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(len(shape)))
        return tile, column, first + block, *inner

    tile, column, block, half, t = places(shape[:3])
    at = tile, block // 2, 4 * column + t, 2 * (block % 2) + half
    pallas.store(steps_ref.at[at], jnp.sum((steps & 255) << 8 * i, 3), mask=block < own.blocks)
    tile, column, block = places(shape[:1])
    pallas.store(sizes_ref.at[tile, column, block], size, mask=block < own.blocks)
    total = jnp.sum(jnp.sum(steps, 3), 2).astype(jnp.float32)
    if own.mins:
        pieces = fragments_int8.pieces_of_pairs((size * jnp.sum(total, 1)).reshape(PREPARED // 2, 2))
        block = first + 2 * lax.broadcasted_iota(jnp.int32, (PREPARED // 2,), 0)
        tile, column = (jnp.broadcast_to(j, block.shape) for j in (m // COLUMNS, m % COLUMNS))
        for i, piece in enumerate(pieces):
            at = tile, block // 8, 4 * column + block // 2 % 4, jnp.full_like(block, i)
            pallas.store(sums_ref.at[at], piece, mask=block < own.blocks)
        return
    if own.sub_block == INT8_BLOCK:
        at, total = (tile, column, block), jnp.sum(total, 1)
    else:
        tile, column, block, half = places(shape[:2])
        at, size = (tile, column, 2 * block + half), jnp.broadcast_to(size[:, None], total.shape)
    total = size * total if own.offsets else fragments_int8.EXACT + own.zero * total
    pallas.store(sums_ref.at[at], total, mask=block < own.blocks)


# --- the product -----------------------------------------------------------------------------------------------------


class Columns:
    """What a step reads of x: steps by 64 inputs, sizes by four blocks, sums by four sub-blocks (for `mins`: all), (P,
    4) each; sizes and sums for columns 2 t and for columns 2 t + 1."""

    def __init__(self, x: Operand, reader: Reader, own: Plan, first_tile: jax.Array) -> None:
        self.x, self.reader, self.own, self.first_tile = x, reader, own, first_tile
        self.live = min(own.rows, COLUMNS)
        # It is little: copied ahead of time, too. Of units of 256 it would be so much that layouts are converted.
        self.early = self.live <= 2 and reader.unit < 256
        blocks, sums = 4 * reader.unit // INT8_BLOCK, 4 * reader.unit // reader.sub_block
        self.blocks, self.sums, self.span = blocks, sums, min(4, blocks)
        numbers = [("sizes", j) for j in range(-(-blocks // 4))]
        numbers += [("sums", j) for j in range(0 if reader.mins else sums // 4)]
        self.keys = [("steps", 0, j) for j in range(blocks // 2)] + [("mins", 0, 0)] * reader.mins
        self.keys += [(name, column, j) for name, j in numbers for column in range(2)]

    def place(self, key: tuple[str, int, int], s: jax.Array, tile: int) -> Place:
        name, column, j = key
        warp, _, t, lane = coordinates(lax.broadcasted_iota(jnp.int32, (32 * self.own.warps,), 0))
        group = s * self.own.warps + warp
        zero = jnp.zeros_like(t)
        tile = zero if self.early else zero + clipped(self.first_tile + tile, self.own)
        if name in ("steps", "mins"):
            count = 4 * self.live
            has, lane = lane < count, lane % count  # other columns have the same: nobody looks at them
            slots = Slots(count, warp * count + lane, copies=has, name="columns")
            if name == "mins":
                return Place(self.x.sums, (tile, group, lane, zero), 4, slots)
            return Place(self.x.steps, (tile, group * (self.blocks // 2) + j, lane, zero), 4, slots)
        slots = Slots(1, warp, copies=lane == 0, name="lane 0")
        column = zero if self.early else 2 * t
        if name == "sizes":
            return Place(self.x.sizes, (tile, column + key[1], group * self.blocks + 4 * j), self.span, slots)
        return Place(self.x.sums, (tile, column + key[1], group * self.sums + 4 * j), 4, slots)


def _kernel(*refs, own: Plan, format: str) -> None:
    """One program: ROWS rows of w, all of K, `own.program_tiles` tiles of eight columns."""
    x_refs, y_ref = refs[:3], refs[-1]
    matrix, _ = matrix_of(refs[3:-1], own, format, (own.outputs,), own.group)
    reader, tiles = matrix.reader, own.program_tiles
    first_tile = pallas.program_id(1) * tiles
    thread, item = (lax.broadcasted_iota(jnp.int32, (32 * own.warps, 4), axis) for axis in (0, 1))
    columns = Columns(Operand(*x_refs), reader, own, first_tile)
    nothing = jnp.zeros_like(item)
    zero = fragments.zeros(pallas.load(x_refs[0].at[nothing, nothing, thread % 32, item]))

    def places(s: jax.Array) -> list[list[Place | None]]:
        x = [columns.place(key, s, 0) for key in columns.keys] if columns.early else []
        return [*matrix.places(s), x]

    ahead = Ahead(places, own.warps, own.steps, own.stages, ring_bytes(own.warps, tiles))

    def step(s: jax.Array, carry: tuple) -> tuple:
        token, totals = carry
        token, (*taken, x) = ahead.next(token, s)
        rows = matrix.read(s, taken)
        put = dict(zip(columns.keys, x, strict=True)) if columns.early else {}

        @functools.cache
        def read(tile: int, *key) -> jax.Array:
            if columns.early:
                return put.get(key, zero)
            return _read(columns.place(key, s, tile))

        return token, _add_step(totals, zero, rows, read, reader)

    _, totals = lax.fori_loop(0, own.steps, step, (ahead.begin(), (((zero,) * 4, zero),) * tiles))
    for tile, ((first, second, third, fourth), mins) in enumerate(totals):
        total = fragments.sum_over_warps(first + second + (third + fourth) + mins, own.warps)
        leave([y_ref], None, None, total, matrix.first, first_tile + tile, own, jnp.int32(0))


def _read(place: Place) -> jax.Array:
    """`read_now`, in a way that Triton sees to be four neighbours."""
    if place.span < 4:
        return read_now(place)
    shape = place.at[0].shape[0], 4
    *at, last = (jnp.broadcast_to(i[:, None], shape) for i in place.at)
    return pallas.load(place.ref.at[(*at, last + lax.broadcasted_iota(jnp.int32, shape, 1))])


def _add_step(totals: tuple, zero, rows: list[Codes], read: Callable, reader: Reader) -> tuple:
    """totals, of tiles of x, and the products of four units of w, in rows g and g + 8; read: tile, key -> (P, 4). Of a
    tile there are the totals of each unit, and then those of mins: in the order of `triton_int8_row`."""
    totals, per = [[list(units), mins] for units, mins in totals], reader.sub_block // 16
    words_of_rows = [[word.astype(jnp.int32) for word in row.lowered()] for row in rows]
    if reader.mins:
        (low, factor_low), (high, factor_high) = (row.mins for row in rows)
        a = fragments_int8.mins(low, high, lax.broadcasted_iota(jnp.int32, zero.shape, 0) % 4)
        for tile, own in enumerate(totals):
            offsets = fragments_int8.mma_mins(zero, a, read(tile, "mins", 0, 0))
            own[1] = fragments.add_scaled(offsets, factor_low, factor_high, own[1], 0, False)

    def both(tile: int, name: str, j: int) -> tuple[jax.Array, jax.Array]:
        return read(tile, name, 0, j), read(tile, name, 1, j)

    for unit in range(4):
        for sub, scales in enumerate(zip(rows[0].scales, rows[1].scales, strict=True)):
            place = unit * (reader.unit // reader.sub_block) + sub  # of the sub-blocks of four units
            block = place * reader.sub_block // INT8_BLOCK
            size = (block % 4) * (2 if reader.unit == 16 else 1)  # two sizes take the places of four
            a = tuple(words[sub * per + i] for i in range(per) for words in words_of_rows)
            items = place % 4, unit, size
            for tile, (units, _) in enumerate(totals):
                sums = fragments_int8.mma_int8(a, read(tile, "steps", 0, block // 2), unit, place * per % 4)
                levels = None if reader.offsets or reader.mins else both(tile, "sums", place // 4)
                sizes = both(tile, "sizes", block // 4)
                units[unit] = fragments_int8.add_exact(sums, levels, scales, sizes, units[unit], items)
                if reader.offsets:
                    offsets = rows[0].offsets[sub], rows[1].offsets[sub]
                    own = fragments.by_column(*both(tile, "sums", place // 4), place % 4)
                    units[unit] = fragments.add_scaled(own, *offsets, units[unit], unit, False)
    return tuple((tuple(units), mins) for units, mins in totals)
