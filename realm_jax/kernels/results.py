"""What programs of a product leave of their sums. Called by `triton_matmul`, `triton_int8` and `triton_wide`."""

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
    """`store` to result number `which`, from where the sums are: Triton would pass them on through shared memory, with
    two barriers."""
    if pallas.interpreting():
        for number, y_ref in enumerate(y_refs):
            store(y_ref, back_ref, total, row, tile, own, which == number)
        return
    thread, type = lax.broadcasted_iota(jnp.int32, total.shape, 0), y_refs[0].dtype.name
    m = _first_row(thread, tile, own)
    rows = jnp.where((thread < 32) | (own.across > 0), own.rows - m, 0)
    lines = []
    for item in range(0, 4, own.pieces):
        column, high = (item % 2, item // 2) if own.pieces == 1 else (0, item // 2)
        if column >= own.rows:
            continue
        made = f"mov.f32 y, {{0[{item}]}};"
        if own.pieces == 2:
            made += f"mul.rn.f32 z, {{0[{item + 1}]}}, {LOW_BITS}; add.rn.f32 y, y, z;"
        made += f"mul.rn.f32 y, y, {TWO_TO_24}; mul.rn.f32 y, y, {{1[{item}]}};" if back_ref is not None else ""
        made += "" if type == "float32" else f"cvt.rn.{PTX[type]}.f32 h, y;"
        lines.append((column, high, made))
    _put(y_refs, lines, total, total if backs is None else backs, rows, m, row, own, which)


def keep(
    sums_refs: Sequence, total: Fragment, turn: jax.Array, row: jax.Array, tile: jax.Array, own: Plan, which
) -> None:
    """The sums of a turn, times 2^24: columns of its row of `sums_refs`' number `which` (turns, columns, N) float32."""
    if pallas.interpreting():
        for number, sums_ref in enumerate(sums_refs):
            thread, item = (lax.broadcasted_iota(jnp.int32, total.shape, axis) for axis in (0, 1))
            _, _, t, _ = coordinates(thread)
            n, inside = _outputs(thread, item // 2, row, own, sums_ref.shape[2])
            at = jnp.broadcast_to(turn, n.shape), 8 * tile + 2 * t + item % 2, n
            mask = inside & (tile < own.tiles) & (which == number)
            pallas.store(sums_ref.at[at], total * 2.0**24, mask=mask)
        return
    thread = lax.broadcasted_iota(jnp.int32, total.shape, 0)
    column = 8 * tile + thread % 4 * 2
    lines = [(item % 2, item // 2, f"mul.rn.f32 y, {{0[{item}]}}, {TWO_TO_24};") for item in range(4)]
    _put(sums_refs, lines, total, total, 8 * own.tiles - column, 8 * own.tiles * turn + column, row, own, which)


def _put(
    refs: Sequence, lines: Sequence[tuple[int, int, str]], total: Fragment, other: Fragment, left: jax.Array,
    first: jax.Array, row: jax.Array, own: Plan, which: jax.Array,
) -> None:  # fmt: skip
    """Stores to ref number `which`, whose last axis is outputs, and the one before it has `first`, and `left` more.

    lines: of each item its place after `first`, whether it is of row g + 8, and assembly that leaves it in y, or in h
    where it has 16 bits; {0[i]} is item i of the total, {1[i]} of the other.
    """
    thread, many = lax.broadcasted_iota(jnp.int32, total.shape, 0), len(refs)
    n = row + thread % 32 // 4 + (ROWS * (thread // 32) if own.across else 0)
    value, other_at, left_at, n_at, which_at = (4 * (1 + many + i) for i in range(5))
    items = [[f"${at + i}" for i in range(4)] for at in (value, other_at)]
    text = "{ .reg .f32 y, z; .reg .b16 h; .reg .pred p, q;\n"
    for place, high, made in lines:
        text += made.format(*items) + f"setp.gt.s32 q, ${left_at}, {place};"
        for number, ref in enumerate(refs):
            outputs, size = ref.shape[-1], ref.dtype.itemsize
            text += f"setp.lt.and.s32 p, ${n_at}, {outputs - 8 * high}, q;"
            text += f"setp.eq.and.s32 p, ${which_at}, {number}, p;" if many > 1 else ""
            address = f"[${4 * (1 + number)} + {(place * outputs + 8 * high) * size}]"
            text += f"@p st.global.{f'b32 {address}, y' if size == 4 else f'b16 {address}, h'};\n"
    text += " ".join(f"mov.b32 ${i}, 0;" for i in range(4)) + "}"
    addresses = [(ref, first * ref.shape[-1] + n) for ref in refs]
    operands = total, other, left, n, jnp.broadcast_to(which, n.shape)
    constraints = ["=&f"] * 4 + ["l"] * (4 * many) + ["f"] * 8 + ["r"] * 12
    shape = pallas.Shape(total.shape, jnp.float32)
    assembly(text, constraints, shape, *operands, addresses=addresses, pack=4, pure=False, kept=True)


def _first_row(thread: jax.Array, tile: jax.Array, own: Plan) -> jax.Array:
    """Of x, of the columns that a thread has sums of in a tile of columns."""
    return tile * (8 // own.pieces) + thread % 4 * (2 // own.pieces)


def _outputs(thread: jax.Array, half: jax.Array, row: jax.Array, own: Plan, outputs: int) -> tuple:
    """Which output a thread's item is, of row g or g + 8 (`half`), and whether the thread has one."""
    warp, g, _, _ = coordinates(thread)
    n = row + g + 8 * half
    if own.across:
        n = n + ROWS * warp
    return n, (n < outputs) & (True if own.across else warp == 0)
