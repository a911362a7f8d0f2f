"""Encoders of IQ4_NL and IQ4_XS: a search for the scale under which the weights fall close to the 16 values.

The scales that ggml's quantize_row_iq4_nl_impl tries (ggml-quants.c, ntry = 7) are tried, each fitted by least squares
to the values that it gives, and the one that leaves the least error is kept. The squared error of a weight x counts
rms + |x| times, with the root mean square of its 32 (ggml: x^2 times, which leaves more error); with importance q,
q * sqrt(2 mean x^2 + x^2) times, with the mean over the block, as in ggml. By method "mse" it counts once, or q times.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.quant.codebooks import codebook
from realm_jax.quant.methods import DEFAULT_METHOD, METHODS, NEGLECTED
from realm_jax.quant.opaque import settle
from realm_jax.quant.words import pack, pack_bytes

Planes = dict[str, jax.Array]

TRIES = [127, *range(-134, -119)]  # what the weight of greatest magnitude is multiplied to


def sub_blocks(w: jax.Array, size: int) -> jax.Array:
    """Rows (..., K) in blocks of `size` as float32 (..., G, S, 32)."""
    return w.astype(jnp.float32).reshape(*w.shape[:-1], w.shape[-1] // size, size // 32, 32)


def inverse_or_zero(x: jax.Array) -> jax.Array:
    """1 / x, and 0 for 0. The division stands last: XLA keeps its result in memory, and would repeat cheaper things."""
    return 1 / jnp.where(x == 0, jnp.inf, x)


def extreme(x: jax.Array) -> jax.Array:
    """The number of greatest magnitude, sign and all: (..., n) to (...)."""
    high, low = x.max(-1), x.min(-1)
    return jnp.where(high >= -low, high, low)


def nearest(x: jax.Array, names: np.ndarray) -> jax.Array:
    """For each x, the name of the nearest of the 16 values, upwards at a tie. names: (16,), of the dtype wanted."""
    values = codebook("IQ4_NL").values.astype(np.float32)
    found = jnp.full_like(x, names[0], names.dtype)
    for border, name in zip((values[1:] + values[:-1]) / 2, names[1:], strict=True):
        found = jnp.where(x >= border, name, found)
    return found


def search(x: jax.Array, weights: jax.Array) -> jax.Array:
    """For x ~ scale * value, of greatest magnitude 1: the scale of least weighted squared error, (..., 32) to (...)."""
    values = codebook("IQ4_NL").values.astype(np.float32)

    def total(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum("...j,...j->...", a, b, precision=lax.Precision.HIGHEST)

    def attempt(best: tuple[jax.Array, jax.Array], inverse: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        value = nearest(x * inverse, values)
        weighted = weights * value
        sum_vx, sum_vv = total(weighted, x), total(weighted, value)
        scale = jnp.where(sum_vv > 0, sum_vx / jnp.where(sum_vv > 0, sum_vv, 1), 1 / inverse)
        candidate = scale * sum_vx, scale  # what the fit takes off the squared error
        return tuple(jnp.where(candidate[0] > best[0], *pair) for pair in zip(candidate, best, strict=True)), None

    start = jnp.full(x.shape[:-1], -1, jnp.float32), jnp.zeros(x.shape[:-1], jnp.float32)
    return lax.scan(attempt, start, jnp.array(TRIES, jnp.float32))[0][1]


def error_weights(x: jax.Array, importance: jax.Array | None, method: str) -> jax.Array:
    """How often the squared error of each weight (..., G, S, 32) counts, up to a factor for each block: about 1."""
    relative = x * inverse_or_zero(jnp.abs(x).max((-1, -2)))[..., None, None]  # its squares neither vanish nor overflow
    squares = relative * relative
    if importance is None and METHODS[method].plain:
        return jnp.ones_like(x)
    if importance is None:
        return jnp.sqrt(squares.mean(-1, keepdims=True)) + jnp.abs(relative)
    q = importance * inverse_or_zero(importance.max((-1, -2)))[..., None, None] + NEGLECTED
    return q if METHODS[method].plain else q * jnp.sqrt(2 * squares.mean((-1, -2), keepdims=True) + squares)


def fit(x: jax.Array, importance: jax.Array | None, method: str) -> jax.Array:
    """The scales (..., G, S) that suit weights (..., G, S, 32), for importance of the same shape."""
    unit = extreme(x)
    return search(x * inverse_or_zero(unit)[..., None], error_weights(x, importance, method)) * unit


def encode(w: jax.Array, importance: jax.Array | None, method: str, size: int) -> tuple[jax.Array, jax.Array]:
    """Weights in sub-blocks (..., G, S, 32), for blocks of `size`, and the scales (..., G, S) that suit them."""
    x = sub_blocks(w, size)
    q = None if importance is None else sub_blocks(jnp.broadcast_to(importance, w.shape), size)
    return x, lax.optimization_barrier(fit(x, q, method))


def pack_codes(x: jax.Array, scales: jax.Array) -> jax.Array:
    """The plane of codes of weights (..., G, S, 32) under the scales (..., G, S) that a reader will see."""
    codes = nearest(x * inverse_or_zero(scales)[..., None], np.arange(16, dtype=np.uint32))
    return pack(codes.reshape(*x.shape[:-3], -1, 2, 4, 4), 4)


def encode_iq4_nl(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
    x, scales = encode(w, importance, method, 32)
    d = settle(scales.astype(jnp.float16))
    return {"d": d[..., 0], "qs": pack_codes(x, d.astype(jnp.float32))}


def encode_iq4_xs(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
    x, scales = encode(w, importance, method, 256)
    d = settle((extreme(scales) / -32).astype(jnp.float16))
    read = d.astype(jnp.float32)[..., None]
    integers = jnp.clip(jnp.round(scales * inverse_or_zero(read)), -32, 31)
    return {
        "d": d,
        "scales": pack_bytes(integers.astype(jnp.int32) + 32),
        "qs": pack_codes(x, read * integers),
    }
