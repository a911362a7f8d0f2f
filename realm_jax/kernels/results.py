"""What programs of a product leave of their sums. Called by `triton_matmul` and `triton_wide`."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import pallas
from realm_jax.kernels.fragments import Fragment
from realm_jax.kernels.lanes import coordinates
from realm_jax.kernels.operand import LOW
from realm_jax.kernels.plan import ROWS, Plan, grid_of
from realm_jax.kernels.turns import shared


def shapes(own: Plan, outputs: tuple[int, ...], dtype: jnp.dtype) -> tuple[pallas.Shape, ...]:
    """What a launch leaves: results (M, N), or kept sums, for each of the weights; last, if any, sums that wait in memory."""
    of_turns = [pallas.Shape((own.turns, 8 * own.tiles, count), jnp.float32) for count in outputs]
    left = of_turns if own.split else [pallas.Shape((own.rows, count), dtype) for count in outputs]
    if own.waits and not shared(own):
        programs, tiled, _ = grid_of(own, outputs)
        waiting = programs, tiled * own.program_tiles, 32 * own.warps, 4
        left.append(pallas.Shape(waiting, jnp.float32))
    return tuple(left)


def store(y_ref, back_ref, total: Fragment, row: jax.Array, tile: jax.Array, own: Plan, here: jax.Array) -> None:
    """If `here`, the sums of a tile of columns, from `row` of w, as results (M, N): pieces joined, scaling undone."""
    count = 4 // own.pieces
    thread, item = (lax.broadcasted_iota(jnp.int32, (len(total), count), axis) for axis in (0, 1))
    if own.pieces == 2:
        pair = lax.broadcasted_iota(jnp.int32, (len(total), 2, 2), 2)
        total = jnp.sum(total.reshape(pair.shape) * jnp.where(pair == 0, 1.0, LOW), -1)
    _, _, t, _ = coordinates(thread)
    m = tile * (8 // own.pieces) + (t if own.pieces == 2 else 2 * t + item % 2)
    n, inside = _outputs(thread, item // (count // 2), row, own, y_ref.shape[1])
    back = pallas.load(back_ref.at[jnp.minimum(m, own.rows - 1)])
    total = (total * 2.0**24 * back).astype(y_ref.dtype)
    pallas.store(y_ref.at[m, n], total, mask=inside & (m < own.rows) & here)


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
