"""Bit fields of 32-bit words in jnp: how the format modules read and write their planes.

Shapes: `W` words of a chunk, `C` chunks of a row, `P` parts of a byte (the two nibbles, the four bit pairs, ...),
4 bytes of a word. Byte 0 is the least significant one, as in a little-endian file.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def field_shifts(bits: int) -> jax.Array:
    """Where each field of `bits` bits of each byte starts in its word: uint32 (P, 1, 4), broadcast over the words.

    Computed, not a constant: XLA's CPU backend would look a constant up for every weight, at half the speed.
    """
    part, byte = (lax.broadcasted_iota(jnp.uint32, (8 // bits, 1, 4), axis) for axis in (0, 2))
    return part * np.uint32(bits) + byte * np.uint32(8)


def unpack(words_WC: jax.Array, bits: int) -> jax.Array:
    """Word-major words (..., W, C) to fields of `bits` bits, int32 (..., C, P, W, 4): the order of the weights."""
    words = jnp.swapaxes(words_WC, -1, -2)[..., :, None, :, None]
    return ((words >> field_shifts(bits)) & np.uint32((1 << bits) - 1)).astype(jnp.int32)


def pack(codes_CPWb: jax.Array, bits: int) -> jax.Array:
    """The inverse of `unpack`: integers (..., C, P, W, 4) in 0..2**bits - 1 to words (..., W, C)."""
    fields = codes_CPWb.astype(jnp.uint32) << field_shifts(bits)
    return jnp.swapaxes(fields.sum((-1, -3), dtype=jnp.uint32), -1, -2)


def unpack_bytes(words_WC: jax.Array, *, signed: bool = False) -> jax.Array:
    """Word-major words (..., W, C) to bytes as int32 (..., C, 4 W)."""
    values = unpack(words_WC, 8)[..., 0, :, :]
    values = (values << 24) >> 24 if signed else values
    return values.reshape(*values.shape[:-2], 4 * values.shape[-2])


def pack_bytes(values: jax.Array) -> jax.Array:
    """The inverse of `unpack_bytes` (either kind): integers (..., C, 4 W) to words (..., W, C)."""
    values = values.reshape(*values.shape[:-1], 1, values.shape[-1] // 4, 4)
    return pack(values & 0xFF, 8)


def unpack_halves(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A word that holds two float16 numbers, low half first, to two float32 arrays of the same shape."""
    low, high = (word & np.uint32(0xFFFF)).astype(jnp.uint16), (word >> np.uint32(16)).astype(jnp.uint16)
    low, high = (lax.bitcast_convert_type(half, jnp.float16) for half in (low, high))
    return low.astype(jnp.float32), high.astype(jnp.float32)


def pack_halves(low: jax.Array, high: jax.Array) -> jax.Array:
    """The inverse of `unpack_halves`; rounds to float16."""
    bits = (lax.bitcast_convert_type(half.astype(jnp.float16), jnp.uint16).astype(jnp.uint32) for half in (low, high))
    low, high = bits
    return low | high << np.uint32(16)


def exact_product(scale: jax.Array, codes: jax.Array) -> jax.Array:
    """float32 scale times int32 code (at most 8 bits) as IEEE 754 says, also where XLA would flush subnormals to zero.

    XLA's CPU backend reads subnormal float32 numbers as zero. A subnormal with the bits `k` is k * 2^-149, so the
    product is the integer k * code: its own bit pattern if that is subnormal too, else the float32 of that integer
    with 149 taken from its exponent (the conversion rounds once, to nearest even, as the product would).
    """
    scale, codes = jnp.broadcast_arrays(scale, codes)
    bits = lax.bitcast_convert_type(scale, jnp.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    count = (magnitude & np.uint32(0x7FFFFF)).astype(jnp.int32) * jnp.abs(codes)
    rounded = lax.bitcast_convert_type(count.astype(jnp.float32), jnp.uint32) - np.uint32(149 << 23)
    tiny = jnp.where(count < 1 << 23, count.astype(jnp.uint32), rounded)
    sign = (bits ^ codes.astype(jnp.uint32)) & np.uint32(0x80000000)
    usual = lax.bitcast_convert_type(scale * codes.astype(jnp.float32), jnp.uint32)
    return lax.bitcast_convert_type(jnp.where(magnitude < 0x800000, tiny | sign, usual), jnp.float32)
