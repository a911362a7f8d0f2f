"""The table of formats: every tensor type that this package computes with, by its ggml name.

Used by `tensor` (packed weights), by the model loader and saver, by the kernels, and to print the table in the docs.
"""

import gguf
import jax.numpy as jnp
import numpy as np

from realm_jax.errors import RealmError
from realm_jax.quant import blocks_k, blocks_legacy
from realm_jax.quant.layout import Format, stripes

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
    )
}
DENSE_FORMATS: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
NON_FINITE_BITS = {2: np.uint16(0x7C00), 4: np.uint32(0x7F800000), "BF16": np.uint16(0x7F80)}


def get_format(name: str) -> Format:
    """The block format of that name; RealmError for any other, saying whether it is known to ggml at all."""
    if name in FORMATS:
        return FORMATS[name]
    if name in DENSE_FORMATS:
        raise RealmError(f"{name} is a dense format, not a block format; block formats: {', '.join(FORMATS)}")
    known = name in gguf.GGMLQuantizationType.__members__ or name in ("NVFP4", "Q1_0", "Q2_0")
    trouble = "is a ggml format that is not supported" if known else "is not a ggml format"
    raise RealmError(f"format {name} {trouble}; supported: {', '.join([*DENSE_FORMATS, *FORMATS])}")


def row_bytes(name: str, width: int) -> int:
    """Bytes of one row of `width` weights in a block or dense format; RealmError as `get_format`, or if not whole."""
    if name in DENSE_FORMATS:
        return width * DENSE_FORMATS[name].itemsize
    kind = get_format(name)
    return kind.blocks_in_row(width) * kind.block_bytes


def check_finite(raw: np.ndarray, format: str) -> int | None:
    """Index of the first block with a NaN or infinite scale, counted over the whole tensor; None if there is none.

    raw: uint8 (..., row_bytes). For dense formats, the index of the first value that is not finite. Only the bytes of
    the scales are read, in stripes.
    """
    rows = raw.reshape(-1, raw.shape[-1])
    if format in DENSE_FORMATS:
        size = DENSE_FORMATS[format].itemsize
        bits, per_row = NON_FINITE_BITS.get(format, NON_FINITE_BITS[size]), raw.shape[-1] // size
    else:
        kind = get_format(format)
        bits, per_row = None, raw.shape[-1] // kind.block_bytes
    for stripe in stripes(rows):
        if bits is not None:
            bad = _non_finite(rows[stripe].view(bits.dtype), bits)
        else:
            views = (view for _, view in kind.scale_views(rows[stripe]))
            bad = np.logical_or.reduce([_non_finite(view, NON_FINITE_BITS[view.itemsize]) for view in views])
        if bad.any():
            return stripe.start * per_row + int(bad.argmax())
    return None


def _non_finite(values: np.ndarray, exponent: np.generic) -> np.ndarray:
    """Where the exponent bits of floating-point numbers, given as unsigned integers, are all ones."""
    return (values & exponent) == exponent
