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
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import codes, fragments, pallas, triton_wide
from realm_jax.kernels.ahead import Ahead, matrix_of, operands_of, place_of_pairs, places_of_pieces, places_of_sums
from realm_jax.kernels.lanes import coordinates, halves_of
from realm_jax.kernels.mins import add_mins, add_wholes
from realm_jax.kernels.operand import Prepared, operand_of
from realm_jax.kernels.plan import Plan, clipped, cut, grid_of, ring_bytes, together
from realm_jax.kernels.results import backs_of, leave, shapes
from realm_jax.kernels.ring import Place, read_few
from realm_jax.kernels.tiles import Tiles, find
from realm_jax.kernels.turns import add_up
from realm_jax.quant.tensor import QuantizedTensor


def refuses(x_shape: tuple[int, ...], w: QuantizedTensor) -> str | None:
    """Why the kernel cannot serve this call, or None if it can."""
    if not pallas.available():
        return "it needs an NVIDIA GPU from Ampere up"
    if w.format not in codes.READERS:
        return "it cannot read this format"
    rows = math.prod(x_shape[:-1])
    most = find(w.format, *w.shape).most_rows
    if not 1 <= rows <= most or 0 in w.shape:
        return f"it takes 1 to {most} rows, not {rows}"
    return None


def matmul(x: jax.Array | Prepared, w: QuantizedTensor, tiles: Tiles | None = None) -> jax.Array:
    """x (..., K) @ w.T for packed weights (N, K), in the dtype of x; for few rows of x. tiles: None, what was found
    best for such weights on this device.

    Of float32 x 22 bits of every number count (fewer of one that is 2^29 times smaller than the largest of its row);
    16-bit x is exact. A row of x that is not finite gives NaN.
    """
    return _launch(x, [w], cut(math.prod(x.shape[:-1]), x.dtype, w, tiles))[0]


def matmul_each(x: jax.Array | Prepared, weights: Sequence[QuantizedTensor]) -> list[jax.Array]:
    """`matmul` of x by each of the weights: one launch for those next to each other that can share it."""
    plans = [cut(math.prod(x.shape[:-1]), x.dtype, w) for w in weights]
    return [y for own in together(weights, plans) for y in _launch(x, [weights[i] for i in own], plans[own[0]])]


def _launch(x: jax.Array | Prepared, weights: list[QuantizedTensor], own: Plan) -> list[jax.Array]:
    """Products by weights of one format and one plan, but for their outputs."""
    format = weights[0].format
    prepared = operand_of(x, own.form(codes.READERS[format]))
    outputs = tuple(w.shape[0] for w in weights)
    kernel = triton_wide.kernel if own.across else _kernel
    results = pallas.call(
        functools.partial(kernel, own=own, format=format, outputs=outputs),
        [*prepared, *operands_of(weights)],
        shapes(own, outputs, x.dtype),
        grid=grid_of(own, outputs),
        num_warps=own.warps,
        num_stages=1,
        name=f"matmul_{format}",
    )[: len(outputs)]
    if own.split:
        results = add_up(results, prepared.back, own, x.dtype)
    return [y.reshape(*x.shape[:-1], -1) for y in results]


def _kernel(*refs, own: Plan, format: str, outputs: tuple[int, ...]) -> None:
    """One program: ROWS rows of one of the weights, all of K, `own.program_tiles` tiles of eight columns."""
    pieces_ref, sums_ref, back_ref, *plane_refs = refs[: -len(outputs)]
    matrix, which = matrix_of(plane_refs, own, format, outputs, own.group)
    reader = matrix.reader
    first_tile, tiles = pallas.program_id(1) * own.program_tiles, own.program_tiles
    thread, item = (lax.broadcasted_iota(jnp.int32, (32 * own.warps, 4), axis) for axis in (0, 1))
    warp, _, t, lane_id = coordinates(thread)
    live = min(own.rows * own.pieces, 8)  # columns of a tile that are not zero
    early = live <= 2  # what a step reads of x is little: read ahead of time, too
    blocks = 4 * reader.unit // 32

    zero = fragments.zeros(pallas.load(pieces_ref.at[jnp.zeros_like(item), jnp.zeros_like(item), lane_id, item]))

    def everywhere(number: jax.Array | int) -> jax.Array:
        return jnp.broadcast_to(jnp.int32(number), thread.shape)

    def load_pieces(tile: int, block: jax.Array) -> jax.Array:
        at = everywhere(clipped(first_tile + tile, own)), block, lane_id, item
        return pallas.load(pieces_ref.at[at])

    def load_sums(tile: int, sub: int, column: int, place: jax.Array) -> jax.Array:
        if own.pieces == 2 and column:  # a second piece: its sum is in the first
            return zero
        at = everywhere(clipped(first_tile + tile, own)), 2 * t + column, everywhere(sub), 4 * place + item
        return pallas.load(sums_ref.at[at])

    def places(s: jax.Array) -> list[list[Place | None]]:
        x = []
        if early:
            x = places_of_pieces(pieces_ref, s, blocks, live, own.warps)
            if reader.mins:
                x.append(pairs_place(0, s))
            elif reader.offsets:
                x += places_of_sums(sums_ref, s, live, own.pieces, own.warps)
        return [*matrix.places(s), x]

    def pairs_place(tile: int, s: jax.Array) -> Place:
        return place_of_pairs(sums_ref, clipped(first_tile + tile, own), s, live, own.warps)

    ahead = Ahead(places, own.warps, own.steps, own.stages, ring_bytes(own.warps, tiles))

    def step(s: jax.Array, carry: tuple) -> tuple:
        token, totals = carry
        token, (*taken, x) = ahead.next(token, s)
        rows = matrix.read(s, taken)
        parts = [halves_of(row, reader.zero) for row in rows]
        place = s * own.warps + warp
        sums = [zero] * tiles if reader.factors else totals
        for unit in range(4):
            for sub in range(reader.unit // reader.sub_block):
                add_sub_block(unit, sub, rows, parts, x, place, sums)
        if reader.factors:
            totals = add_wholes(totals, sums, rows, live == 1)
        if reader.mins:
            totals = add_mins(totals, rows, lambda tile: pairs(tile, x, s), own.pieces, zero, live == 1)
        return token, totals

    def pairs(tile: int, x: list, s: jax.Array) -> jax.Array:
        return x[blocks] if early else read_few(pairs_place(tile, s))

    def add_sub_block(unit: int, sub: int, rows: list, parts: list, x: list, place: jax.Array, totals: list) -> None:
        """What one sub-block of a unit adds to the totals; with factors, its products alone."""
        sixteens = reader.sub_block // 16
        low, high = rows
        for tile, total in enumerate(totals):
            dot = total if reader.factors else zero
            for sixteen in range(sub * sixteens, sub * sixteens + sixteens):
                at = unit * (reader.unit // 16) + sixteen  # of the 16s of four units
                pieces = x[at // 2] if early else load_pieces(tile, place * blocks + at // 2)
                a = tuple(part[sixteen][pair] for pair in range(2) for part in parts)
                dot = fragments.mma(dot, a, pieces, unit, at % 2)
            if reader.factors:
                totals[tile] = dot
                continue
            total = fragments.add_scaled(dot, low.scales[sub], high.scales[sub], total, unit, live == 1)
            if reader.offsets:
                sums = fragments.by_column(*sums_of(tile, sub, x, place), unit)
                total = fragments.add_scaled(sums, low.offsets[sub], high.offsets[sub], total, unit, live == 1)
            totals[tile] = total

    def sums_of(tile: int, sub: int, x: list, place: jax.Array) -> list[jax.Array]:
        if not early:
            return [load_sums(tile, sub, column, place) for column in range(2)]
        return [zero if items is None else items for items in x[blocks + 2 * sub : blocks + 2 * sub + 2]]

    backs = [backs_of(back_ref, first_tile + tile, own) for tile in range(tiles)]

    _, totals = lax.fori_loop(0, own.steps, step, (ahead.begin(), [zero] * tiles))
    for tile, total in enumerate(totals):
        total = fragments.sum_over_warps(total, own.warps)
        leave(refs[-len(outputs) :], back_ref, backs[tile], total, matrix.first, first_tile + tile, own, which)
