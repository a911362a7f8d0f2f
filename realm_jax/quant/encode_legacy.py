"""Encoders of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1 and Q8_K. float32 weights to planes, in jnp.

Without an importance they only round, and give the bytes of ggml's reference quantizers (`quantize_row_*_ref` in
ggml-quants.c; `gguf.quants`). That takes care: XLA's CPU backend contracts a product and a sum to one rounding, so
products are clamped before a constant is added; and quotients are those of `division`. With an importance, or by method
"mse", the 4- and 5-bit formats search as `quantize_row_q4_0_impl` and its neighbours do.

Shapes: `L` lanes (see `lanes`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.quant.division import divide
from realm_jax.quant.fit import fit_scale, fit_scale_and_low, mean_square, normalized, round_to_codes
from realm_jax.quant.lanes import (
    blocks_of,
    columns,
    highest,
    largest,
    over_block,
    pack_words,
    to_lanes,
    to_plane,
    total,
)
from realm_jax.quant.methods import DEFAULT_METHOD, METHODS, importance_lanes, steps
from realm_jax.quant.opaque import settle
from realm_jax.quant.words import pack_halves, unpack_halves

Planes = dict[str, jax.Array]
ONE = np.float32(1)

Encoder = Callable[[jax.Array, jax.Array | None, str], Planes]


def truncate(scaled: jax.Array, middle: float, top: int) -> jax.Array:
    """Codes 0..top of scaled >= -middle: the sum with middle + 0.5 without its fraction, as ggml rounds these codes."""
    rounded = (jnp.minimum(scaled, top + 1) + jnp.float32(middle + 0.5)).astype(jnp.int32)
    return jnp.minimum(rounded, top)


def code_planes(codes: jax.Array, bits: int) -> Planes:
    """Codes (..., G, 32) of 4 or 5 bits, in the order of the rows, to `qs` and, for 5 bits, `qh`."""
    codes = settle(codes.astype(jnp.uint8))
    nibbles = codes[..., :16] & np.uint8(0xF) | codes[..., 16:] << np.uint8(4)
    words = lax.bitcast_convert_type(nibbles.reshape(*nibbles.shape[:-1], 4, 4), jnp.uint32)
    planes = {"qs": jnp.swapaxes(words, -1, -2)}
    if bits == 5:
        high = (codes >> np.uint8(4)).astype(jnp.uint32) << lax.iota(jnp.uint32, 32)
        planes["qh"] = high.sum(-1, dtype=jnp.uint32)
    return planes


def encode_centered(bits: int) -> Encoder:
    """Q4_0, Q5_0: the largest weight gets about the lowest code."""
    middle = 1 << (bits - 1)

    def encode(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
        blocks = blocks_of(w, 32)
        if importance is None and not METHODS[method].plain:
            d = settle(_largest(blocks) * np.float32(-1 / middle))
            codes = truncate(blocks * divide(ONE, d)[..., None], middle, 2 * middle - 1)
        else:
            x, unit = normalized(to_lanes(w, 32))
            weights = _weights(x, importance_lanes(importance, w, 32), METHODS[method].plain)
            scale = fit_scale(columns(x), columns(weights), -middle - steps(-0.9, 0.9, 0.1), -middle, middle - 1)
            d = settle((scale * unit).astype(jnp.float16)).astype(jnp.float32)
            codes = round_to_codes(blocks, divide(ONE, d)[..., None], -middle, middle - 1) + middle
        return {"d": d.astype(jnp.float16), **code_planes(codes, bits)}

    return encode


def encode_with_min(bits: int) -> Encoder:
    """Q4_1, Q5_1: about from the smallest weight of the block to the largest."""
    top = (1 << bits) - 1

    def encode(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
        blocks = blocks_of(w, 32)
        if importance is None and not METHODS[method].plain:
            low, high = settle((blocks.min(-1), blocks.max(-1)))
            d = divide(high - low, top)
            plane = pack_halves(d, low)
            codes = truncate((blocks - low[..., None]) * divide(ONE, d)[..., None], 0, top)
        else:
            x, unit = normalized(to_lanes(w, 32))
            weights = _weights(x, importance_lanes(importance, w, 32), METHODS[method].plain)
            tried = top + steps(-0.9, 0.9, 0.05)
            scale, low = fit_scale_and_low(columns(x), columns(weights), tried, top, negative_low=True)
            plane = settle(pack_halves(scale * unit, -low * unit))
            d, m = unpack_halves(plane)
            codes = round_to_codes(blocks - settle(m)[..., None], divide(ONE, d)[..., None], 0, top)
        return {"d": plane, **code_planes(codes, bits)}

    return encode


def _largest(blocks: jax.Array) -> jax.Array:
    """Of blocks (..., G, 32): the number of greatest magnitude, the first at a tie, which only then is looked for."""
    low, high = settle((blocks.min(-1), blocks.max(-1)))
    return lax.cond(
        ((high == -low) & (high > 0)).any(),
        lambda: largest(columns(blocks, -1)),
        lambda: jnp.where(high > -low, high, low),
    )


def _weights(x: jax.Array, importance: jax.Array | None, plain: bool) -> jax.Array:
    """The weight of each squared error, (32, L): ggml's, but for the mean square, which it takes of a whole row."""
    if importance is None:
        return jnp.ones_like(x)
    return settle(importance if plain else importance * jnp.sqrt(mean_square(x) + x**2))


def byte_codes(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q8_0, Q8_1: d (L) and codes -127..127 (32, L), halves rounded away from zero."""
    x = to_lanes(w, 32)
    d = divide(over_block(highest, jnp.abs(x)), 127)
    codes = lax.round(x * divide(ONE, d), lax.RoundingMethod.AWAY_FROM_ZERO).astype(jnp.int32)
    return d, jnp.clip(codes, -127, 127)


def byte_words(codes: jax.Array) -> jax.Array:
    """Signed codes (n, L) as chunks of 8 words."""
    return pack_words(codes & 0xFF, 8, 8)


def encode_q8_0(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
    d, codes = byte_codes(w)
    return {"d": d.astype(jnp.float16), "qs": byte_words(codes)}


def encode_q8_1(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
    d, codes = byte_codes(w)
    return {"d": pack_halves(d, total(columns(codes)).astype(jnp.float32) * d), "qs": byte_words(codes)}


def encode_q8_k(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
    """Codes -127..127 of 256 weights with a float32 scale; ggml gives the largest weight the code -127."""
    x = to_lanes(w, 256)
    top = settle(largest(columns(x)))
    scale = divide(jnp.float32(-127), top)
    codes = jnp.clip(jnp.round(x * scale), -127, 127).astype(jnp.int32)
    sums = total(columns(codes.reshape(16, 16, *scale.shape), 1)).reshape(8, 2, *scale.shape)
    sums = (sums[:, 0] & 0xFFFF | sums[:, 1] << 16).astype(jnp.uint32)
    return {"d": divide(ONE, scale), "qs": byte_words(codes), "bsums": to_plane(sums[None])}
