"""Encoders of MXFP4 and NVFP4: the largest weight decides the scale, the others are rounded to the nearest value.

They give the bytes of ggml's quantize_row_mxfp4_ref and quantize_row_nvfp4_ref (ggml-quants.c). Importance and
method change nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.quant.codebooks import codebook
from realm_jax.quant.division import divide
from realm_jax.quant.lanes import blocks_of
from realm_jax.quant.methods import DEFAULT_METHOD
from realm_jax.quant.small_floats import e8m0, e8m0_of, ue4m3, ue4m3_of
from realm_jax.quant.words import pack, pack_bytes

Planes = dict[str, jax.Array]


def codes_fp4(x: jax.Array, scale: jax.Array) -> jax.Array:
    """E2M1 codes of weights (..., n) over half scales (...): the nearest value, the smaller at a tie."""
    values = codebook("MXFP4").values[:8].astype(np.float32)
    scale = scale[..., None]
    codes = jnp.zeros_like(x, jnp.uint32)
    for code, border in enumerate((values[1:] + values[:-1]) / 2, 1):
        codes = jnp.where(jnp.abs(x) > border * scale, np.uint32(code), codes)
    codes = jnp.where(scale == 0, np.uint32(0), codes)
    return codes | jnp.where((x < 0) & (codes != 0), np.uint32(8), np.uint32(0))


def encode_mxfp4(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
    x = blocks_of(w, 32)
    e = lax.optimization_barrier(e8m0_of(jnp.abs(x).max(-1)))
    codes = codes_fp4(x, e8m0(e))
    return {"e": e, "qs": pack(codes.reshape(*e.shape, 2, 4, 4), 4)}


def encode_nvfp4(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
    x = blocks_of(w, 16)
    top = jnp.abs(x).max(-1)
    scales = ue4m3_of(divide(top, 6))
    scales = lax.optimization_barrier(scales)
    codes = codes_fp4(x, ue4m3(scales))
    return {
        "d": pack_bytes(scales.reshape(*w.shape[:-1], -1, 4))[..., 0, :],
        "qs": pack(codes.reshape(*scales.shape, 2, 2, 4), 4),
    }
