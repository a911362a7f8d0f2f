"""Division rounded as IEEE 754 says, on every backend. The encoders that must give ggml's bytes use it.

XLA's GPU backend divides to within a few units in the last place, and every backend rewrites x / c and x * (1 / d) as
it sees fit: each would turn a code here and there.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.quant.opaque import settle

FRACTION, HIDDEN, EXPONENT = np.uint32(0x007FFFFF), np.uint32(0x00800000), np.uint32(0x7F800000)


def divide(a: jax.Array, b: jax.Array | float) -> jax.Array:
    """float32 a / b to nearest, ties to even, in memory of its own; 0 where b is 0. Subnormal numbers count as 0."""
    a, b = lax.optimization_barrier(jnp.broadcast_arrays(a, jnp.asarray(b, jnp.float32)))
    if jax.default_backend() == "cpu":
        return settle(jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b)))
    return settle(long_division(a, b))


def long_division(
    a: jax.Array, b: jax.Array, about: Callable[[jax.Array, jax.Array], jax.Array] = jnp.divide
) -> jax.Array:
    """a / b by a division of numbers in 1..2 that may be off by a few units in the last place, `about`.

    The significands are integers A and B of 24 bits, and so is their quotient Q, A being shifted. The remainder
    A 2^s - B Q is small, so that arithmetic modulo 2^32 gives it exactly: it says by how much Q is wrong.
    """
    bits_a, bits_b = (lax.bitcast_convert_type(jnp.abs(x), jnp.uint32) for x in (a, b))
    A, B = (bits & FRACTION | HIDDEN for bits in (bits_a, bits_b))
    shift = jnp.where(A >= B, np.uint32(23), np.uint32(24))
    start = about(A.astype(jnp.float32), B.astype(jnp.float32))
    Q = jnp.round(start * jnp.where(A >= B, np.float32(1 << 23), np.float32(1 << 24))).astype(jnp.uint32)
    rest = lax.bitcast_convert_type((A << shift) - B * Q, jnp.int32)
    B = B.astype(jnp.int32)
    for _ in range(8):
        step = jnp.where(rest < 0, -1, jnp.where(rest >= B, 1, 0))
        Q, rest = Q + step.astype(jnp.uint32), rest - step * B
    up = (2 * rest > B) | ((2 * rest == B) & (Q & np.uint32(1) == 1))
    power = lax.bitcast_convert_type((np.uint32(127) - shift) << np.uint32(23), jnp.float32)  # 2^-s
    quotient = (Q + up.astype(jnp.uint32)).astype(jnp.float32) * power
    unit_a, unit_b = bits_a & EXPONENT, bits_b & EXPONENT
    over_b = lax.bitcast_convert_type(np.uint32(254 << 23) - unit_b, jnp.float32)
    quotient = quotient * over_b * lax.bitcast_convert_type(unit_a, jnp.float32)
    quotient = jnp.where((a < 0) != (b < 0), -quotient, quotient)
    return jnp.where((unit_a == 0) | (unit_b == 0), 0, quotient)
