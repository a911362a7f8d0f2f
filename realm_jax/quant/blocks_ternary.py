"""The formats with weights -d, 0 and d: TQ1_0 (five weights a byte, in base 3) and TQ2_0 (two bits a weight).

Byte layouts: `block_tq1_0` and `block_tq2_0` in ggml-common.h. A byte of TQ1_0 is a fraction of 256 whose digits in
base 3 are the codes: times 3, the digit is what exceeds a byte; the rest times 3, the next. Byte j of its first 32
holds the weights j, 32 + j, ..., 128 + j; of the next 16, 160 + j, 176 + j, ..., 224 + j; and of the 4 in `qh`,
240 + j, ..., 252 + j.
"""

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.quant import encode_ternary
from realm_jax.quant.blocks_k import block_codes, words
from realm_jax.quant.blocks_legacy import HALF
from realm_jax.quant.layout import Affine, Field, Format
from realm_jax.quant.words import unpack_bytes

Planes = dict[str, jax.Array]


EVEN = np.uint32(0x00FF00FF)  # every other byte of a word, with room above it to be multiplied by 3


def trits(words: jax.Array, count: int) -> jax.Array:
    """The first `count` digits in base 3 of every byte: words (..., W, G) to words of digits (..., count * W, G)."""
    halves, digits = [words & EVEN, words >> np.uint32(8) & EVEN], []
    for _ in range(count):
        tripled = [half * np.uint32(3) for half in halves]
        even, odd = (half >> np.uint32(8) & EVEN for half in tripled)
        digits.append(even | odd << np.uint32(8))
        halves = [half & EVEN for half in tripled]
    return jnp.concatenate(digits, -2)


def decode_tq1_0(planes: Planes) -> Affine:
    low, high = planes["qs"], planes["qh"][..., None, :]
    digits = jnp.concatenate([trits(low[..., :8, :], 5), trits(low[..., 8:, :], 5), trits(high, 4)], -2)
    return Affine(unpack_bytes(digits)[..., None, :] - 1, planes["d"].astype(jnp.float32)[..., None])


def decode_tq2_0(planes: Planes) -> Affine:
    return Affine(block_codes(planes["qs"], 2, 256) - 1, planes["d"].astype(jnp.float32)[..., None])


TQ1_0 = Format(
    "TQ1_0", 256, 54,
    (HALF._replace(offset=52), words("qs", 0, 1, 12), Field("qh", 48, np.uint32)),
    decode_tq1_0, encode_ternary.encode_tq1_0,
)  # fmt: skip
TQ2_0 = Format(
    "TQ2_0", 256, 66,
    (HALF._replace(offset=64), words("qs", 0, 2, 8)),
    decode_tq2_0, encode_ternary.encode_tq2_0,
)  # fmt: skip
