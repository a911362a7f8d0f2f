"""Encoders of TQ1_0 and TQ2_0: each weight to the nearest of -d, 0 and d, where d is the largest of the block.

They give the bytes of ggml's quantize_row_tq1_0_ref and quantize_row_tq2_0_ref (ggml-quants.c); a half is rounded away
from zero. Importance and method change nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.quant.division import divide
from realm_jax.quant.lanes import blocks_of
from realm_jax.quant.methods import DEFAULT_METHOD
from realm_jax.quant.words import pack, pack_bytes

Planes = dict[str, jax.Array]


def ternary(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """d, float16 (..., G), and codes 0, 1, 2: uint32 (..., G, 256)."""
    x = blocks_of(w, 256)
    d = jnp.abs(x).max(-1)
    inverse = divide(jnp.float32(1), d)
    scaled = x * inverse[..., None]
    codes = jnp.where(scaled >= 0.5, np.uint32(2), jnp.where(scaled <= -0.5, np.uint32(0), np.uint32(1)))
    return d.astype(jnp.float16), codes


def fractions(codes: jax.Array, count: int) -> jax.Array:
    """Digits in base 3, (..., G, count * n), as the bytes (..., G, n) that `blocks_ternary.trits` reads."""
    digits = codes.reshape(*codes.shape[:-1], count, codes.shape[-1] // count)
    number = sum(digits[..., i, :] * np.uint32(3 ** (4 - i)) for i in range(count))
    return (number * np.uint32(256) + np.uint32(242)) // np.uint32(243)  # number / 243 in 256ths, rounded up


def encode_tq1_0(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
    d, codes = ternary(w)
    low = jnp.concatenate([fractions(codes[..., :160], 5), fractions(codes[..., 160:240], 5)], -1)
    return {"d": d, "qs": pack_bytes(low), "qh": pack_bytes(fractions(codes[..., 240:], 4))[..., 0, :]}


def encode_tq2_0(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
    d, codes = ternary(w)
    return {"d": d, "qs": pack(codes.reshape(*d.shape[:-1], 2 * d.shape[-1], 4, 8, 4), 2)}
