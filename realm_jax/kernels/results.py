"""What programs of a product leave of their sums. Called by `triton_matmul`, `triton_int8` and `triton_wide`."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.kernels import pallas
from realm_jax.kernels.assembly import assembly
from realm_jax.kernels.fragments import Fragment
from realm_jax.kernels.lanes import coordinates
from realm_jax.kernels.operand import LOW
from realm_jax.kernels.plan import ROWS, Plan, grid_of
from realm_jax.kernels.turns import shared

LOW_BITS, TWO_TO_24 = (f"0f{np.float32(number).view(np.uint32):08X}" for number in (LOW, 2.0**24))  # as PTX has them
PTX = {"bfloat16": "bf16", "float16": "f16"}  # types


def shapes(own: Plan, outputs: tuple[int, ...], dtype: jnp.dtype) -> tuple[pallas.Shape, ...]:
    """What a launch leaves: results (M, N), or kept sums, for each of the weights; last, if any, sums that wait in
    memory."""
    of_turns = [pallas.Shape((own.turns, 8 * own.tiles, count), jnp.float32) for count in outputs]
    left = of_turns if own.split else [pallas.Shape((own.rows, count), dtype) for count in outputs]
    if own.waits and not shared(own):
        programs, tiled, _ = grid_of(own, outputs)
        waiting = programs, tiled * own.program_tiles, 32 * own.warps, 4
        left.append(pallas.Shape(waiting, jnp.float32))
    return tuple(left)


def store(y_ref, back_ref, total: Fragment, row: jax.Array, tile: jax.Array, own: Plan, here: jax.Array) -> None:
    """If `here`, the sums of a tile of columns, from `row` of w, as results (M, N): pieces joined, scaling undone.
    back_ref: None, if they are not scaled."""
    count = 4 // own.pieces
    thread, item = (lax.broadcasted_iota(jnp.int32, (len(total), count), axis) for axis in (0, 1))
    if own.pieces == 2:
        pair = lax.broadcasted_iota(jnp.int32, (len(total), 2, 2), 2)
        total = jnp.sum(total.reshape(pair.shape) * jnp.where(pair == 0, 1.0, LOW), -1)
    _, _, t, _ = coordinates(thread)
    m = tile * (8 // own.pieces) + (t if own.pieces == 2 else 2 * t + item % 2)
    n, inside = _outputs(thread, item // (count // 2), row, own, y_ref.shape[1])
    if back_ref is not None:
        total = total * 2.0**24 * pallas.load(back_ref.at[jnp.minimum(m, own.rows - 1)])
    pallas.store(y_ref.at[m, n], total.astype(y_ref.dtype), mask=inside & (m < own.rows) & here)


def backs_of(back_ref, tile: jax.Array, own: Plan) -> Fragment | None:
    """What `leave` wants of `back_ref`, if there is one, for a tile of columns; nothing in the interpreter."""
    if back_ref is None or pallas.interpreting():
        return None
    row = _first_row(lax.broadcasted_iota(jnp.int32, (32 * own.warps,), 0), tile, own)
    addresses = [(back_ref, jnp.minimum(row + i, own.rows - 1)) for i in range(2 // own.pieces)]
    text = f"ld.global.b32 $0, [$4]; ld.global.b32 $1, [${3 + len(addresses)}]; mov.b32 $2, $0; mov.b32 $3, $1;"
    shape, constraints = pallas.Shape(row.shape, jnp.float32), ["=&f"] * 4 + ["l"] * len(addresses) + ["r"]
    return assembly(text, constraints, shape, row, addresses=addresses, results=4, pure=False)


def leave(
    y_refs: Sequence, back_ref, backs: Fragment | None, total: Fragment, row: jax.Array, tile: jax.Array, own: Plan,
    which: jax.Array,
) -> None:  # fmt: skip
    """`store` to result number `which`, where warps have no rows of their own, from where the sums are: Triton would
    pass them on through shared memory, with two barriers."""
    if pallas.interpreting():
        for number, y_ref in enumerate(y_refs):
            store(y_ref, back_ref, total, row, tile, own, which == number)
        return
    thread, many, type = lax.broadcasted_iota(jnp.int32, total.shape, 0), len(y_refs), y_refs[0].dtype.name
    m, n = _first_row(thread, tile, own), row + thread % 32 // 4
    rows = jnp.where(thread < 32, own.rows - m, 0)
    value, backs_at, rows_at, n_at, which_at = (4 * (1 + many + i) for i in range(5))
    text = "{ .reg .f32 y, z; .reg .b16 h; .reg .pred p, q;\n"
    for item in range(0, 4, own.pieces):
        column, high = (item % 2, item // 2) if own.pieces == 1 else (0, item // 2)
        if column >= own.rows:
            continue
        text += f"mov.f32 y, ${value + item};"
        if own.pieces == 2:
            text += f"mul.rn.f32 z, ${value + item + 1}, {LOW_BITS}; add.rn.f32 y, y, z;"
        text += f"mul.rn.f32 y, y, {TWO_TO_24}; mul.rn.f32 y, y, ${backs_at + item};" if back_ref is not None else ""
        text += f"setp.gt.s32 q, ${rows_at}, {column};"
        text += "" if type == "float32" else f"cvt.rn.{PTX[type]}.f32 h, y;"
        for number, y_ref in enumerate(y_refs):
            outputs = y_ref.shape[1]
            beyond = (column * outputs + 8 * high) * y_ref.dtype.itemsize
            text += f"setp.lt.and.s32 p, ${n_at}, {outputs - 8 * high}, q;"
            text += f"setp.eq.and.s32 p, ${which_at}, {number}, p;" if many > 1 else ""
            put = "b32 [{0}], y" if type == "float32" else "b16 [{0}], h"
            text += f"@p st.global.{put.format(f'${4 * (1 + number)} + {beyond}')};\n"
    text += " ".join(f"mov.b32 ${i}, 0;" for i in range(4)) + "}"
    addresses = [(y_ref, m * y_ref.shape[1] + n) for y_ref in y_refs]
    operands = total, total if backs is None else backs, rows, n, jnp.broadcast_to(which, n.shape)
    constraints = ["=&f"] * 4 + ["l"] * (4 * many) + ["f"] * 8 + ["r"] * 12
    shape = pallas.Shape(total.shape, jnp.float32)
    assembly(text, constraints, shape, *operands, addresses=addresses, pack=4, pure=False, kept=True)


def _first_row(thread: jax.Array, tile: jax.Array, own: Plan) -> jax.Array:
    """Of x, of the columns that a thread has sums of in a tile of columns."""
    return tile * (8 // own.pieces) + thread % 4 * (2 // own.pieces)


def keep(sums_ref, total: Fragment, turn: jax.Array, row: jax.Array, tile: jax.Array, own: Plan, here) -> None:
    """If `here`, the sums of a turn, times 2^24, columns of its row of `sums_ref` (turns, columns, N) float32."""
    thread, item = (lax.broadcasted_iota(jnp.int32, total.shape, axis) for axis in (0, 1))
    _, _, t, _ = coordinates(thread)
    n, inside = _outputs(thread, item // 2, row, own, sums_ref.shape[2])
    at = jnp.broadcast_to(turn, n.shape), 8 * tile + 2 * t + item % 2, n
    pallas.store(sums_ref.at[at], total * 2.0**24, mask=inside & (tile < own.tiles) & here)


def added(sums_TCN: jax.Array, back: jax.Array, own: Plan, dtype: jnp.dtype) -> jax.Array:
    """What `store` makes of the turns' sums that were kept, one after the other: (M, N)."""
    total_CN = functools.reduce(jnp.add, [sums_TCN[turn] for turn in range(own.turns)])
    if own.pieces == 2:
        total_CN = total_CN.reshape(-1, 2, total_CN.shape[1])
        total_CN = total_CN[:, 0] + total_CN[:, 1] * LOW
    # 2^24 is in them already: XLA would multiply it by `back` first, and that may be more than float32 holds.
    return (total_CN[: own.rows] * back[: own.rows, None]).astype(dtype)


def _outputs(thread: jax.Array, half: jax.Array, row: jax.Array, own: Plan, outputs: int) -> tuple:
    """Which output a thread's item is, of row g or g + 8 (`half`), and whether the thread has one."""
    warp, g, _, _ = coordinates(thread)
    n = row + g + 8 * half
    if own.across:
        n = n + ROWS * warp
    return n, (n < outputs) & (True if own.across else warp == 0)
