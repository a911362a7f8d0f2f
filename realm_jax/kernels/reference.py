"""The implementation that says what is right: dequantize, then a dot in float32. Called by `matmul`.

Shape key: `M` rows of x, `N` output features, `K` input features.
"""

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels.residency import packed_until
from realm_jax.quant import QuantizedTensor

INT8_BLOCK = 32  # inputs that share a scale; the blocks of every format are whole ones of these
STRIPE_WEIGHTS = 1 << 18  # on CPU, so many weights are dequantized at a time: 1 MB, which stays in cache


def dense_matmul(x: jax.Array, w_NK: jax.Array) -> jax.Array:
    """x (..., K) @ w_NK.T, accumulated in float32, in the dtype of x; differentiable in both.

    Two arrays of the same 16-bit dtype are multiplied as they are; else both are float32 first. HIGHEST keeps GPUs
    from rounding float32 to TF32.
    """
    dtype = x.dtype
    if dtype != w_NK.dtype:
        x, w_NK = packed_until(x, w_NK)
        x, w_NK = x.astype(jnp.float32), w_NK.astype(jnp.float32)
    y = jnp.einsum("...k,nk->...n", x, w_NK, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return y.astype(dtype)


def matmul(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    """x (..., K) @ w.T for packed weights (N, K), in the dtype of x."""
    x32 = x.astype(jnp.float32)

    def rows(start: jax.Array | int, count: int) -> jax.Array:
        return dense_matmul(x32, _dequantized_rows(x32, w, start, count))

    starts, count, rest = _stripes(w)
    _, y = lax.scan(lambda _, start: (None, rows(start, count)), None, starts)
    y = jnp.moveaxis(y, 0, -2).reshape(*x.shape[:-1], w.shape[0] - rest)
    if rest:
        y = jnp.concatenate([y, rows(w.shape[0] - rest, rest)], -1)
    return y.astype(x.dtype)


def matmul_int8(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    """x (..., K) @ w.T of x as 8-bit integers and scales, in the dtype of x. A row that is not finite gives NaN."""
    steps, scale = int8_steps(x)
    rounded = jnp.repeat(scale, INT8_BLOCK, -1) * steps.astype(jnp.float32)
    return matmul(rounded, w).astype(x.dtype)


def int8_steps(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x (..., K) in steps, int8, of a size that 32 neighbours share, float32 (..., K / 32): their largest is 127 steps.

    ggml's Q8_1 (llama.cpp's activations), but that rounds the size to float16. Of neighbours that are not all finite
    the size is NaN.
    """
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, INT8_BLOCK)
    size = jnp.max(jnp.abs(x), -1) / 127
    steps = jnp.round(x / jnp.where(size == 0, jnp.inf, size)[..., None])
    steps = jnp.clip(steps, -127, 127).astype(jnp.int8)
    return steps.reshape(*x.shape[:-2], -1), size + jnp.sum(x * 0, -1)  # the largest may have lost a NaN


def matmul_transposed(y: jax.Array, w: QuantizedTensor) -> jax.Array:
    """y (..., N) @ w, which takes the gradient of `matmul` back to x; in the dtype of y."""
    y32 = y.astype(jnp.float32)

    def rows(start: jax.Array | int, count: int) -> jax.Array:
        part = lax.dynamic_slice_in_dim(y32, start, count, -1)
        return dense_matmul(part, _dequantized_rows(part, w, start, count).T)

    starts, count, rest = _stripes(w)
    zero = jnp.zeros((*y.shape[:-1], w.shape[1]), jnp.float32)
    x, _ = lax.scan(lambda x, start: (x + rows(start, count), None), zero, starts)
    if rest:
        x = x + rows(w.shape[0] - rest, rest)
    return x.astype(y.dtype)


def _stripes(w: QuantizedTensor) -> tuple[jax.Array, int, int]:
    """How the rows of w are dequantized: where each stripe starts, the rows of each, and how many rows are left over.

    All rows at once; but on CPU, where writing a large matrix to fresh memory takes longer than computing it, no more
    than stay in cache.
    """
    rows, width = w.shape
    count = min(rows, max(1, STRIPE_WEIGHTS // width)) if jax.default_backend() == "cpu" else rows
    return count * jnp.arange(rows // count), count, rows % count


def _dequantized_rows(x: jax.Array, w: QuantizedTensor, start: jax.Array | int, count: int) -> jax.Array:
    """Rows of w in float32, not before x is there."""
    part = jax.tree.map(lambda plane: lax.dynamic_slice_in_dim(plane, start, count), w)
    return packed_until(x, part)[1].dequantize()
