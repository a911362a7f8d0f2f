"""The formats with one block of 32 weights: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1.

Byte layouts: `block_q4_0` and its neighbours in ggml-common.h. Weight j of a 4-bit block is the low nibble of byte j
for j < 16, the high nibble of byte j - 16 for the others; bit j of `qh` is the fifth bit of weight j.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.quant import encode_legacy as encode
from realm_jax.quant.layout import Affine, Field, Format
from realm_jax.quant.words import unpack, unpack_bytes, unpack_halves

Planes = dict[str, jax.Array]


def nibbles(planes: Planes) -> jax.Array:
    """The 4-bit codes of a block, (..., G, 1, 32)."""
    codes = unpack(planes["qs"], 4)
    return codes.reshape(*codes.shape[:-3], 1, 32)


def five_bits(planes: Planes) -> jax.Array:
    """The 5-bit codes of a block, (..., G, 1, 32)."""
    high = planes["qh"][..., None, None] >> lax.iota(jnp.uint32, 32)
    return nibbles(planes) | ((high & np.uint32(1)) << np.uint32(4)).astype(jnp.int32)


def byte_codes(planes: Planes) -> jax.Array:
    """The signed 8-bit codes of a block, (..., G, 1, 32)."""
    return unpack_bytes(planes["qs"], signed=True)[..., None, :]


def scale(planes: Planes) -> jax.Array:
    return planes["d"].astype(jnp.float32)[..., None]


def scale_and_offset(planes: Planes) -> tuple[jax.Array, jax.Array]:
    d, m = unpack_halves(planes["d"])
    return d[..., None], m[..., None]


def decode_q4_0(planes: Planes) -> Affine:
    return Affine(nibbles(planes) - 8, scale(planes))


def decode_q4_1(planes: Planes) -> Affine:
    return Affine(nibbles(planes), *scale_and_offset(planes))


def decode_q5_0(planes: Planes) -> Affine:
    return Affine(five_bits(planes) - 16, scale(planes))


def decode_q5_1(planes: Planes) -> Affine:
    return Affine(five_bits(planes), *scale_and_offset(planes))


def decode_q8_0(planes: Planes) -> Affine:
    return Affine(byte_codes(planes), scale(planes))


def decode_q8_1(planes: Planes) -> Affine:
    """The second half of `d` is d * sum(codes), for ggml's integer dot products: not part of the weights."""
    return Affine(byte_codes(planes), scale_and_offset(planes)[0])


HALF = Field("d", 0, np.float16, floats=("d",))
D_AND_M = Field("d", 0, np.uint32, floats=("d", "m"))
D_AND_SUM = Field("d", 0, np.uint32, floats=("d", "s"))


def high_bits(offset: int) -> Field:
    return Field("qh", offset, np.uint32)


def codes(offset: int, words: int) -> Field:
    return Field("qs", offset, np.uint32, words=words)


Q4_0 = Format("Q4_0", 32, 18, (HALF, codes(2, 4)), decode_q4_0, encode.encode_centered(4))
Q4_1 = Format("Q4_1", 32, 20, (D_AND_M, codes(4, 4)), decode_q4_1, encode.encode_with_min(4))
Q5_0 = Format("Q5_0", 32, 22, (HALF, high_bits(2), codes(6, 4)), decode_q5_0, encode.encode_centered(5))
Q5_1 = Format("Q5_1", 32, 24, (D_AND_M, high_bits(4), codes(8, 4)), decode_q5_1, encode.encode_with_min(5))
Q8_0 = Format("Q8_0", 32, 34, (HALF, codes(2, 8)), decode_q8_0, encode.encode_q8_0)
Q8_1 = Format("Q8_1", 32, 36, (D_AND_SUM, codes(4, 8)), decode_q8_1, encode.encode_q8_1)
