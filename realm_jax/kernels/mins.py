"""What a step adds to a product at its end, all at once, where scales and mins are whole numbers times one number of
each four units: sums of products that have the scales in them, and the mins, which the tensor cores multiply by sums of
x. Called by `triton_matmul` and `triton_wide`.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import fragments
from realm_jax.kernels.fragments import Fragment
from realm_jax.kernels.lanes import Codes
from realm_jax.kernels.operand import LOW, SUM_SCALE


def add_wholes(
    totals: Sequence[Fragment], sums: Sequence[Fragment], rows: Sequence[Codes], one: bool = False
) -> list[Fragment]:
    """totals of tiles, and the sums of a step whose codes have their factors in them, times the rows' `whole`. one: see
    `fragments.add_scaled`."""
    wholes = [row.whole for row in rows]
    return [fragments.add_scaled(dot, *wholes, total, 0, one) for total, dot in zip(totals, sums, strict=True)]


def add_mins(
    totals: Sequence[Fragment],
    rows: Sequence[Codes],
    pairs: Callable[[int], Fragment],
    pieces: int,
    zero: Fragment,
    one: bool = False,
) -> list[Fragment]:
    """totals of tiles, and what the mins of rows g and g + 8 add to them.

    pairs: of a tile, what a lane has of `Operand.sums`, each item twice or four times. pieces: columns of a row of x.
    one: see `fragments.add_scaled`.
    """
    t = lax.broadcasted_iota(jnp.int32, zero.shape, 0) % 4
    a = fragments.mins(rows[0].mins[0], rows[1].mins[0], t)
    factors = [row.mins[1] * (2.0**24 / SUM_SCALE) for row in rows]
    totals = list(totals)
    for tile in range(len(totals)):
        sums = pairs(tile)
        for part in range(3 - pieces):
            scaled = [factor * LOW for factor in factors] if part else factors
            dots = fragments.mma_mins(zero, a, sums, 2 * part)
            totals[tile] = fragments.add_scaled(dots, *scaled, totals[tile], 0, one)
    return totals
