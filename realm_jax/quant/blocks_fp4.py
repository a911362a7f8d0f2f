"""The formats whose 4-bit codes name one of 16 values: IQ4_NL, IQ4_XS, MXFP4, NVFP4.

Byte layouts: `block_iq4_nl`, `block_mxfp4` and their neighbours in ggml-common.h. The values of IQ4 stand close
together near zero; those of FP4 are 4-bit floating-point numbers (E2M1), doubled so that they are integers, which is
why their scales are halved. The scale of MXFP4 is a power of two (E8M0, one byte for 32 weights), that of NVFP4 a
floating-point number without sign (UE4M3, one byte for 16). Source of these: OCP Microscaling Formats (MX) 1.0.
"""

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.quant import encode_fp4, encode_iq4
from realm_jax.quant.blocks_k import times
from realm_jax.quant.blocks_legacy import HALF
from realm_jax.quant.codebooks import codebook, table_values
from realm_jax.quant.layout import Affine, Field, Format, Number
from realm_jax.quant.small_floats import e8m0, ue4m3
from realm_jax.quant.words import exact_product, unpack, unpack_bytes

Planes = dict[str, jax.Array]


def values(planes: Planes, book: str, sub_blocks: int, size: int) -> jax.Array:
    """What the codes in `qs` name, int32 (..., G, sub_blocks, size)."""
    codes = table_values(unpack(planes["qs"], 4), codebook(book))
    return codes.reshape(*codes.shape[:-4], codes.shape[-4] // sub_blocks, sub_blocks, size)


def unpack_six_bits(raw: np.ndarray) -> np.ndarray:
    """The scales of IQ4_XS, uint16 (..., 3), to bytes 0..63 (32 stands for 0) in two words: uint32 (..., 1, 2).

    Bits 2i and 2i + 1 of the first item are the high bits of scale i; the nibbles of the others are the low ones.
    """
    high, *low = (raw[..., i].astype(np.uint32) for i in range(3))
    words = []
    for i, nibbles in enumerate(low):
        word = np.zeros_like(high)
        for j in range(4):
            word |= ((nibbles >> 4 * j & 0xF) | (high >> 8 * i + 2 * j & 3) << 4) << 8 * j
        words.append(word)
    return np.stack(words, -1)[..., None, :]


def pack_six_bits(words: np.ndarray) -> np.ndarray:
    """The inverse of `unpack_six_bits`."""
    high, low = np.zeros_like(words[..., 0, 0]), []
    for i in range(2):
        nibbles = np.zeros_like(high)
        for j in range(4):
            scale = words[..., 0, i] >> 8 * j
            nibbles |= (scale & 0xF) << 4 * j
            high |= (scale >> 4 & 3) << 8 * i + 2 * j
        low.append(nibbles)
    return np.stack([high, *low], -1).astype(np.uint16)


def ue4m3_bytes(plane: jax.Array) -> jax.Array:
    """The four scale bytes of a block, uint32 (..., G, 4)."""
    return unpack_bytes(plane[..., None, :]).astype(jnp.uint32)


def read_e8m0(plane: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(plane == np.uint8(0xFF), jnp.nan, e8m0(plane)),)


def read_ue4m3(plane: jax.Array) -> tuple[jax.Array]:
    scales = ue4m3_bytes(plane)
    return (jnp.where(scales & np.uint32(0x7F) == np.uint32(0x7F), jnp.nan, ue4m3(scales)),)


def decode_iq4_nl(planes: Planes) -> Affine:
    return Affine(values(planes, "IQ4_NL", 1, 32), planes["d"].astype(jnp.float32)[..., None])


def decode_iq4_xs(planes: Planes) -> Affine:
    return Affine(values(planes, "IQ4_NL", 8, 32), times(planes["d"], unpack_bytes(planes["scales"]) - 32))


def decode_mxfp4(planes: Planes) -> Affine:
    return Affine(values(planes, "MXFP4", 1, 32), e8m0(planes["e"])[..., None])


def decode_nvfp4(planes: Planes) -> Affine:
    return Affine(values(planes, "MXFP4", 4, 16), ue4m3(ue4m3_bytes(planes["d"])))


E8M0, UE4M3 = Number(np.uint8(0xFF), read_e8m0), Number(np.uint8(0x7F), read_ue4m3)
SCALES = Field(
    "scales", 2, np.uint32, 1, 2, raw_words=3, raw_dtype=np.uint16, unpack=unpack_six_bits, pack=pack_six_bits
)

IQ4_NL = Format("IQ4_NL", 32, 18, (HALF, Field("qs", 2, np.uint32, 1, 4)), decode_iq4_nl, encode_iq4.encode_iq4_nl)
IQ4_XS = Format(
    "IQ4_XS", 256, 136,
    (HALF, SCALES, Field("qs", 8, np.uint32, 8, 4)),
    decode_iq4_xs, encode_iq4.encode_iq4_xs,
)  # fmt: skip
MXFP4 = Format(
    "MXFP4", 32, 17,
    (Field("e", 0, np.uint8, floats=("e",), number=E8M0), Field("qs", 1, np.uint32, 1, 4)),
    decode_mxfp4, encode_fp4.encode_mxfp4,
    product=exact_product,
)  # fmt: skip
NVFP4 = Format(
    "NVFP4", 64, 36,
    (Field("d", 0, np.uint32, floats=("d",), number=UE4M3), Field("qs", 4, np.uint32, 4, 2)),
    decode_nvfp4, encode_fp4.encode_nvfp4,
)  # fmt: skip
