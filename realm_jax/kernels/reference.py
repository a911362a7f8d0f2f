"""The implementation that says what is right: dequantize, then one dot in float32. Called by `matmul`.

Shape key: `M` rows of x, `N` output features, `K` input features.
"""

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.quant import QuantizedTensor


def dot(x: jax.Array, w_NK: jax.Array) -> jax.Array:
    """x (..., K) @ w_NK.T for dense weights, accumulated in float32, in the dtype of x.

    Two arrays of the same 16-bit dtype are multiplied as they are; else both are float32 first. HIGHEST keeps GPUs
    from rounding float32 to TF32.
    """
    x_MK = x.reshape(-1, x.shape[-1])
    if x.dtype != w_NK.dtype:
        x_MK, w_NK = x_MK.astype(jnp.float32), w_NK.astype(jnp.float32)
    # Written so, XLA's CPU backend fuses a product of one row with whatever made w_NK, and never writes w_NK out.
    y_MN = jnp.dot(x_MK, w_NK.T, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return y_MN.reshape(*x.shape[:-1], w_NK.shape[0]).astype(x.dtype)


def matmul(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    """x (..., K) @ w.T for packed weights (N, K), in the dtype of x."""
    return dot(x.astype(jnp.float32), w.dequantize()).astype(x.dtype)


def matmul_transposed(y: jax.Array, w: QuantizedTensor) -> jax.Array:
    """y (..., N) @ w, which takes the gradient of `matmul` back to x; in the dtype of y."""
    return dot(y.astype(jnp.float32), w.dequantize().T).astype(y.dtype)
