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
    if x.dtype != w_NK.dtype or x.dtype == jnp.float32:
        x_in, w_NK = x.astype(jnp.float32), w_NK.astype(jnp.float32)
    else:
        x_in = x
    y = jnp.einsum("...k,nk->...n", x_in, w_NK, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def matmul(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    """x (..., K) @ w.T for packed weights (N, K), in the dtype of x."""
    return dot(x.astype(jnp.float32), w.dequantize()).astype(x.dtype)


def matmul_transposed(y: jax.Array, w: QuantizedTensor) -> jax.Array:
    """y (..., N) @ w, which takes the gradient of `matmul` back to x; in the dtype of y."""
    w_NK = w.dequantize()
    x = jnp.einsum("...n,nk->...k", y.astype(jnp.float32), w_NK, precision=lax.Precision.HIGHEST)
    return x.astype(y.dtype)
