"""Products by packed weights for many rows on a GPU (prefill, training): dequantize once, then the tensor cores. Called
by `matmul`.

Weights stand dense one matrix at a time. 16-bit x is multiplied by weights in its own type (bfloat16) and summed in
float32; float32 x by float32 weights, both read as TF32, which has the 11 bits of float16.
"""

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels.residency import packed_until
from realm_jax.quant.tensor import QuantizedTensor


def refuses(x_shape: tuple[int, ...], w: QuantizedTensor) -> str | None:
    """Why it cannot serve this call, or None if it can."""
    return None if jax.default_backend() == "gpu" else "it needs a GPU"


def matmul(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    """x (..., K) @ w.T for packed weights (N, K), in the dtype of x."""
    return _dot("...k,nk->...n", x, w)


def matmul_transposed(y: jax.Array, w: QuantizedTensor) -> jax.Array:
    """y (..., N) @ w, which takes the gradient of `matmul` back to x; in the dtype of y."""
    return _dot("...n,nk->...k", y, w)


def _dot(spec: str, x: jax.Array, w: QuantizedTensor) -> jax.Array:
    dtype = x.dtype if x.dtype == jnp.bfloat16 else jnp.float32  # float16 could not hold every weight
    x_own, w = packed_until(x.astype(dtype), w)
    precision = lax.DotAlgorithmPreset.TF32_TF32_F32 if dtype == jnp.float32 else None
    y = jnp.einsum(spec, x_own, w.dequantize(dtype), precision=precision, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
