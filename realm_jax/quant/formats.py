"""The table of formats: every tensor type that this package computes with, by its ggml name.

Used by `tensor` (packed weights), by the model loader and saver, by the kernels, and to print the table in the docs.
"""

import jax.numpy as jnp
import numpy as np

from realm_jax.errors import RealmError
from realm_jax.gguf.types import TYPE_BY_NAME
from realm_jax.quant import blocks_fp4, blocks_iq, blocks_k, blocks_legacy, blocks_ternary
from realm_jax.quant.layout import STRIPE_BYTES, Format

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        blocks_legacy.Q4_0,
        blocks_legacy.Q4_1,
        blocks_legacy.Q5_0,
        blocks_legacy.Q5_1,
        blocks_legacy.Q8_0,
        blocks_legacy.Q8_1,
        blocks_k.Q2_K,
        blocks_k.Q3_K,
        blocks_k.Q4_K,
        blocks_k.Q5_K,
        blocks_k.Q6_K,
        blocks_k.Q8_K,
        blocks_iq.IQ1_S,
        blocks_iq.IQ1_M,
        blocks_iq.IQ2_XXS,
        blocks_iq.IQ2_XS,
        blocks_iq.IQ2_S,
        blocks_iq.IQ3_XXS,
        blocks_iq.IQ3_S,
        blocks_fp4.IQ4_NL,
        blocks_fp4.IQ4_XS,
        blocks_ternary.TQ1_0,
        blocks_ternary.TQ2_0,
        blocks_fp4.MXFP4,
        blocks_fp4.NVFP4,
    )
}
DENSE_FORMATS: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
EXPONENTS = {"F32": np.uint32(0x7F800000), "F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80)}  # all ones: not finite


def get_format(name: str) -> Format:
    """The block format of that name; RealmError for any other, saying whether it is known to ggml at all."""
    if name in FORMATS:
        return FORMATS[name]
    if name in DENSE_FORMATS:
        raise RealmError(f"{name} is a dense format, not a block format; block formats: {', '.join(FORMATS)}")
    trouble = "is a ggml format that is not supported" if name in TYPE_BY_NAME else "is not a ggml format"
    raise RealmError(f"format {name} {trouble}; supported: {', '.join([*DENSE_FORMATS, *FORMATS])}")


def row_bytes(name: str, width: int) -> int:
    """Bytes of one row of `width` weights in a block or dense format; RealmError as `get_format`, or if not whole."""
    if name in DENSE_FORMATS:
        return width * DENSE_FORMATS[name].itemsize
    kind = get_format(name)
    return kind.blocks_in_row(width) * kind.block_bytes


def check_finite(raw: np.ndarray, format: str) -> int | None:
    """Index of the first block with a NaN or infinite scale, counted over the whole tensor; None if there is none.

    raw: uint8, whole blocks. For dense formats, the index of the first value that is not finite. Only the bytes of
    the scales are read, a stripe of the tensor at a time.
    """
    block_bytes = DENSE_FORMATS[format].itemsize if format in DENSE_FORMATS else get_format(format).block_bytes
    flat = raw.reshape(-1)
    step = STRIPE_BYTES // block_bytes * block_bytes
    for start in range(0, len(flat), step):
        bad = _non_finite(flat[start : start + step], format)
        if bad.any():
            return start // block_bytes + int(bad.argmax())
    return None


def _non_finite(raw: np.ndarray, format: str) -> np.ndarray:
    """For each block of uint8 (bytes,): whether one of its scales is not finite."""
    if format in DENSE_FORMATS:
        exponent = EXPONENTS[format]
        return (raw.view(exponent.dtype) & exponent) == exponent
    bad = np.zeros(len(raw) // FORMATS[format].block_bytes, bool)
    for bits, special in FORMATS[format].scale_bits(raw):
        bad |= (bits & special) == special
    return bad
