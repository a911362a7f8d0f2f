"""Encoders that only round: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1 and Q8_K. float32 weights to planes, in jnp.

They give the bytes of ggml's reference quantizers (`quantize_row_*_ref` in ggml-quants.c; `gguf.quants`), which takes
care in two places. XLA's CPU backend contracts a product and a sum to one rounding: so products are clamped before a
constant is added. XLA rewrites x * (1 / d) and 1 / (a / b): so a barrier stands between the two operations.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.quant.words import pack, pack_bytes, pack_halves

Planes = dict[str, jax.Array]


def blocks_of(w: jax.Array, size: int) -> jax.Array:
    """Rows (..., K) as blocks (..., G, size), float32."""
    return w.astype(jnp.float32).reshape(*w.shape[:-1], w.shape[-1] // size, size)


def largest(x: jax.Array) -> jax.Array:
    """The (first) value of greatest magnitude in each block, sign and all: (..., n) to (..., 1)."""
    return jnp.take_along_axis(x, jnp.argmax(jnp.abs(x), -1, keepdims=True), -1)


def inverse(d: jax.Array) -> jax.Array:
    """1 / d, rounded on its own; 0 where d is 0."""
    return lax.optimization_barrier(jnp.where(d == 0, 0, 1 / jnp.where(d == 0, 1, d)))


def divide(x: jax.Array, divisor: float) -> jax.Array:
    """x / divisor, not x times a rounded 1 / divisor."""
    return x / lax.optimization_barrier(jnp.full_like(x, divisor))


def truncate(scaled: jax.Array, middle: float, top: int) -> jax.Array:
    """Codes 0..top: scaled + middle + 0.5 without its fraction, as ggml rounds its 4- and 5-bit codes."""
    scaled = jnp.clip(scaled, -middle - 1, top + 1)
    return jnp.clip((scaled + jnp.float32(middle + 0.5)).astype(jnp.int32), 0, top)


def code_planes(codes: jax.Array, bits: int) -> Planes:
    """Codes (..., G, 32) of 4 or 5 bits to `qs` and, for 5 bits, `qh`."""
    planes = {"qs": pack((codes & 0xF).reshape(*codes.shape[:-1], 2, 4, 4), 4)}
    if bits == 5:
        high = (codes >> 4).astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)
        planes["qh"] = high.sum(-1, dtype=jnp.uint32)
    return planes


def encode_centered(bits: int) -> Callable[[jax.Array], Planes]:
    """Q4_0, Q5_0: d is such that the largest weight gets the lowest code."""
    middle = 1 << (bits - 1)

    def encode(w: jax.Array) -> Planes:
        x = blocks_of(w, 32)
        d = largest(x) / -middle  # a power of two: exact
        codes = truncate(x * inverse(d), middle, 2 * middle - 1)
        return {"d": d[..., 0].astype(jnp.float16), **code_planes(codes, bits)}

    return encode


def encode_with_min(bits: int) -> Callable[[jax.Array], Planes]:
    """Q4_1, Q5_1: from the smallest weight of the block to the largest."""
    top = (1 << bits) - 1

    def encode(w: jax.Array) -> Planes:
        x = blocks_of(w, 32)
        low = x.min(-1, keepdims=True)
        d = divide(x.max(-1, keepdims=True) - low, top)
        codes = truncate((x - low) * inverse(d), 0, top)
        return {"d": pack_halves(d[..., 0], low[..., 0]), **code_planes(codes, bits)}

    return encode


def byte_codes(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q8_0, Q8_1: d (..., G) and codes -127..127 (..., G, 32), halves rounded away from zero."""
    x = blocks_of(w, 32)
    d = divide(jnp.abs(x).max(-1, keepdims=True), 127)
    codes = lax.round(x * inverse(d), lax.RoundingMethod.AWAY_FROM_ZERO).astype(jnp.int32)
    return d[..., 0], jnp.clip(codes, -127, 127)


def encode_q8_0(w: jax.Array) -> Planes:
    d, codes = byte_codes(w)
    return {"d": d.astype(jnp.float16), "qs": pack_bytes(codes)}


def encode_q8_1(w: jax.Array) -> Planes:
    d, codes = byte_codes(w)
    return {"d": pack_halves(d, codes.sum(-1).astype(jnp.float32) * d), "qs": pack_bytes(codes)}


def encode_q8_k(w: jax.Array) -> Planes:
    """Codes -127..127 of 256 weights with a float32 scale; ggml gives the largest weight the code -127."""
    x = blocks_of(w, 256)
    top = largest(x)
    scale = lax.optimization_barrier(jnp.where(top == 0, 0, -127 / jnp.where(top == 0, 1, top)))
    codes = jnp.clip(jnp.round(x * scale), -127, 127).astype(jnp.int32)
    sums = codes.reshape(*codes.shape[:-1], 8, 2, 16).sum(-1)
    rows = w.shape[:-1]
    return {
        "d": inverse(scale)[..., 0],
        "qs": pack_bytes(codes.reshape(*rows, -1, 32)),
        "bsums": jnp.swapaxes((sums[..., 0] & 0xFFFF | sums[..., 1] << 16).astype(jnp.uint32), -1, -2),
    }
