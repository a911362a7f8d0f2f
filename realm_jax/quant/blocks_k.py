"""The formats with a super-block of 256 weights: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K.

Byte layouts: `block_q2_K` and its neighbours in ggml-common.h. A super-block has sub-blocks of 16 or 32 weights, each
with a small integer scale (and min) that multiplies the super-block's float16 `d` (and `dmin`). 6-bit scales, which
the file packs in 12 bytes, are a byte each in the planes, four to a word.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.quant import encode_k, encode_legacy
from realm_jax.quant.layout import F32, Affine, Field, Format
from realm_jax.quant.words import exact_product, unpack, unpack_bytes, unpack_halves

Planes = dict[str, jax.Array]

SIX_LOW, FOUR_LOW, TWO_HIGH = np.uint32(0x3F3F3F3F), np.uint32(0x0F0F0F0F), np.uint32(0x30303030)
PAIR_LOW, PAIR_HIGH = np.uint32(0x0000FFFF), np.uint32(0xFFFF0000)


def unpack_scales_and_mins(raw: np.ndarray) -> np.ndarray:
    """12 bytes of Q4_K or Q5_K as 3 words (..., 3) to one word a chunk, (..., 4, 1): scale, scale, min, min.

    Byte j of the three words: EEAAAAAA, ffbbbbbb, BBBBEEEE hold scale j = AAAAAA, min j = bbbbbb,
    scale j + 4 = EEEEEE and min j + 4 = ffBBBB. So whole words are masked, four bytes at a time.
    """
    first, second, third = (raw[..., i] for i in range(3))
    scales = first & SIX_LOW, third & FOUR_LOW | first >> 2 & TWO_HIGH
    mins = second & SIX_LOW, third >> 4 & FOUR_LOW | second >> 2 & TWO_HIGH
    words = []
    for scale, low in zip(scales, mins, strict=True):
        words += [scale & PAIR_LOW | low << 16, scale >> 16 | low & PAIR_HIGH]
    return np.stack(words, -1)[..., None]


def pack_scales_and_mins(words: np.ndarray) -> np.ndarray:
    """The inverse of `unpack_scales_and_mins`."""
    a, b, c, d = (words[..., i, 0] for i in range(4))
    scales = [low & PAIR_LOW | high << 16 for low, high in ((a, b), (c, d))]
    mins = [low >> 16 | high & PAIR_HIGH for low, high in ((a, b), (c, d))]
    first = scales[0] & SIX_LOW | (scales[1] & TWO_HIGH) << 2
    second = mins[0] & SIX_LOW | (mins[1] & TWO_HIGH) << 2
    third = scales[1] & FOUR_LOW | (mins[1] & FOUR_LOW) << 4
    return np.stack([first, second, third], -1)


def unpack_six_bit_scales(raw: np.ndarray) -> np.ndarray:
    """12 bytes of Q3_K as 3 words (..., 3) to two words a chunk, (..., 2, 2): 16 bytes of 0..63 (32 stands for 0).

    Low four bits: the low, then the high nibbles of bytes 0..7. High two bits: bit pairs 0, 1, 2, 3 of bytes 8..11.
    """
    first, second, third = (raw[..., i] for i in range(3))
    words = [
        first & FOUR_LOW | third << 4 & TWO_HIGH,
        second & FOUR_LOW | third << 2 & TWO_HIGH,
        first >> 4 & FOUR_LOW | third & TWO_HIGH,
        second >> 4 & FOUR_LOW | third >> 2 & TWO_HIGH,
    ]
    return np.stack(words, -1).reshape(*raw.shape[:-1], 2, 2)


def pack_six_bit_scales(words: np.ndarray) -> np.ndarray:
    """The inverse of `unpack_six_bit_scales`."""
    a, b, c, d = (words[..., i // 2, i % 2] for i in range(4))
    first = a & FOUR_LOW | (c & FOUR_LOW) << 4
    second = b & FOUR_LOW | (d & FOUR_LOW) << 4
    third = (a & TWO_HIGH) >> 4 | (b & TWO_HIGH) >> 2 | c & TWO_HIGH | (d & TWO_HIGH) << 2
    return np.stack([first, second, third], -1)


def block_codes(words_WC: jax.Array, bits: int, size: int) -> jax.Array:
    """Codes in the order of the weights: int32 (..., G, S, n) with n = size and S sub-blocks in a super-block."""
    values = unpack(words_WC, bits)
    blocks = int(np.prod(values.shape[-4:])) // 256
    return values.reshape(*values.shape[:-4], blocks, 256 // size, size)


def block_bytes(words_WC: jax.Array, *, signed: bool = False) -> jax.Array:
    """The 16 scale bytes of a super-block, which two chunks hold: int32 (..., G, 16)."""
    values = unpack_bytes(words_WC, signed=signed)
    return values.reshape(*values.shape[:-2], values.shape[-2] // 2, 16)


def times(d: jax.Array, integers: jax.Array) -> jax.Array:
    """The scales of sub-blocks: d (..., G) times small integers (..., G, S), float32."""
    return d.astype(jnp.float32)[..., None] * integers.astype(jnp.float32)


def scales_and_mins(planes: Planes) -> tuple[jax.Array, jax.Array]:
    """Q4_K and Q5_K: scale and offset of the 8 sub-blocks of 32 weights, each float32 (..., G, 8)."""
    words, blocks = planes["scales"][..., None], planes["d"].shape
    shift = lax.iota(jnp.uint32, 2) * np.uint32(8)
    scales, mins = (words >> (shift + np.uint32(start)) & np.uint32(0xFF) for start in (0, 16))
    scales, mins = (values.astype(jnp.int32).reshape(*blocks, 8) for values in (scales, mins))
    d, dmin = unpack_halves(planes["d"])
    return times(d, scales), -times(dmin, mins)


def decode_q2_k(planes: Planes) -> Affine:
    d, dmin = unpack_halves(planes["d"])
    both = block_bytes(planes["scales"])
    return Affine(block_codes(planes["qs"], 2, 16), times(d, both & 0xF), -times(dmin, both >> 4))


def decode_q3_k(planes: Planes) -> Affine:
    codes = block_codes(planes["qs"], 2, 16) | block_codes(planes["hmask"], 1, 16) << 2
    return Affine(codes - 4, times(planes["d"], block_bytes(planes["scales"]) - 32))


def decode_q4_k(planes: Planes) -> Affine:
    return Affine(block_codes(planes["qs"], 4, 32), *scales_and_mins(planes))


def decode_q5_k(planes: Planes) -> Affine:
    codes = block_codes(planes["qs"], 4, 32) | block_codes(planes["qh"], 1, 32) << 4
    return Affine(codes, *scales_and_mins(planes))


def decode_q6_k(planes: Planes) -> Affine:
    codes = block_codes(planes["ql"], 4, 16) | block_codes(planes["qh"], 2, 16) << 4
    return Affine(codes - 32, times(planes["d"], block_bytes(planes["scales"], signed=True)))


def decode_q8_k(planes: Planes) -> Affine:
    """`bsums`, sums of 16 codes for ggml's integer dot products, are kept but are not part of the weights."""
    codes = unpack_bytes(planes["qs"], signed=True)
    blocks = planes["d"].shape[-1]
    return Affine(codes.reshape(*planes["d"].shape[:-1], blocks, 1, 256), planes["d"][..., None])


def words(name: str, offset: int, chunks: int, count: int) -> Field:
    """A field of `chunks` times `count` 32-bit words."""
    return Field(name, offset, np.uint32, chunks, count)


D_AND_MIN = Field("d", 0, np.uint32, floats=("d", "dmin"))
SCALES_AND_MINS = Field(
    "scales", 4, np.uint32, 4, raw_words=3, unpack=unpack_scales_and_mins, pack=pack_scales_and_mins
)
SIX_BIT_SCALES = Field(
    "scales", 96, np.uint32, 2, 2, raw_words=3, unpack=unpack_six_bit_scales, pack=pack_six_bit_scales
)

Q2_K = Format(
    "Q2_K", 256, 84,
    (D_AND_MIN._replace(offset=80), words("scales", 0, 2, 2), words("qs", 16, 2, 8)),
    decode_q2_k, encode_k.encode_q2_k,
)  # fmt: skip
Q3_K = Format(
    "Q3_K", 256, 110,
    (Field("d", 108, np.float16, floats=("d",)), SIX_BIT_SCALES, words("hmask", 0, 1, 8), words("qs", 32, 2, 8)),
    decode_q3_k, encode_k.encode_q3_k,
)  # fmt: skip
Q4_K = Format("Q4_K", 256, 144, (D_AND_MIN, SCALES_AND_MINS, words("qs", 16, 4, 8)), decode_q4_k, encode_k.encode_q4_k)
Q5_K = Format(
    "Q5_K",
    256,
    176,
    (D_AND_MIN, SCALES_AND_MINS, words("qh", 16, 1, 8), words("qs", 48, 4, 8)),
    decode_q5_k,
    encode_k.encode_q5_k,
)
Q6_K = Format(
    "Q6_K", 256, 210,
    (
        Field("d", 208, np.float16, floats=("d",)),
        words("scales", 192, 2, 2), words("ql", 0, 2, 16), words("qh", 128, 2, 8),
    ),
    decode_q6_k, encode_k.encode_q6_k,
)  # fmt: skip
Q8_K = Format(
    "Q8_K", 256, 292,
    (Field("d", 0, np.float32, floats=("d",), number=F32), words("qs", 4, 8, 8), words("bsums", 260, 1, 8)),
    decode_q8_k, encode_legacy.encode_q8_k,
    product=exact_product,
)  # fmt: skip
