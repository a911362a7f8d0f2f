"""What the mins of a step add to a product, all at once: whole numbers times one number of each four units, which the
tensor cores multiply by sums of x. Called by `triton_matmul` and `triton_wide`.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import fragments
from realm_jax.kernels.fragments import Fragment
from realm_jax.kernels.lanes import Codes, coordinates
from realm_jax.kernels.operand import LOW


def add_mins(
    totals: Sequence[Fragment],
    rows: Sequence[Codes],
    pairs: Callable[[int], Sequence[Fragment]],
    pieces: int,
    zero: Fragment,
    one: bool = False,
) -> list[Fragment]:
    """totals of tiles, and what the mins of rows g and g + 8 add to them.

    pairs: of a tile, for `fragments.sum_pairs`. pieces: columns of a row of x. one: see `fragments.add_scaled`.
    """
    _, g, t, _ = coordinates(lax.broadcasted_iota(jnp.int32, zero.shape, 0))
    a = fragments.mins(rows[0].mins[0], rows[1].mins[0], t)
    odd = g % 2 if pieces == 2 else None  # columns of second pieces take the second pieces of sums
    factors = [row.mins[1] * (2.0**24 / fragments.SUM_SCALE) for row in rows]
    totals = list(totals)
    for tile in range(len(totals)):
        sums = fragments.sum_pairs(*pairs(tile), odd)
        for part in range(3 - pieces):
            scaled = [factor * LOW for factor in factors] if part else factors
            dots = fragments.mma_mins(zero, a, sums, part)
            totals[tile] = fragments.add_scaled(dots, *scaled, totals[tile], 0, one)
    return totals
