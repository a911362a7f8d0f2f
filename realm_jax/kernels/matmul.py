"""The one matrix product of the package: `matmul(x, w)` is x @ w.T for packed or dense weights.

Model code calls `matmul` and nothing else. An implementation is a row of `IMPLEMENTATIONS`; adding a kernel is adding
a row. Shape key: `M` rows of x, `N` output features, `K` input features.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from realm_jax.errors import RealmError
from realm_jax.kernels import dense, reference, triton_matmul
from realm_jax.quant import QuantizedTensor

Weight = jax.Array | QuantizedTensor


class Implementation(NamedTuple):
    """One way to multiply by packed weights.

    refuses: (x shape, w) -> why it cannot serve that call, or None if it can; decided in Python, from static facts.
    apply: (x (..., K), w (N, K)) -> (..., N) in the dtype of x. transposed: (y (..., N), w) -> (..., K), for gradients.
    """

    refuses: Callable[[tuple[int, ...], QuantizedTensor], str | None]
    apply: Callable[[jax.Array, QuantizedTensor], jax.Array]
    transposed: Callable[[jax.Array, QuantizedTensor], jax.Array]


@custom_vmap
def _few_rows(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    """`triton_matmul.matmul`; under `vmap`, more rows of x are more rows, and other weights for each a loop."""
    return triton_matmul.matmul(x, w)


@_few_rows.def_vmap
def _few_rows_vmap(size: int, batched: tuple, x: jax.Array, w: QuantizedTensor) -> tuple[jax.Array, bool]:
    if not any(jax.tree.leaves(batched[1])):
        return matmul(x, w), True
    pairs = jax.tree.map(lambda a, own: a if own else jnp.broadcast_to(a, (size, *a.shape)), (x, w), tuple(batched))
    return lax.map(lambda pair: matmul(*pair), pairs), True


def _transposed(y: jax.Array, w: QuantizedTensor) -> jax.Array:
    """The gradient of a product by few rows: dense on a GPU, else (in the interpreter) the reference."""
    own = reference if dense.refuses(y.shape, w) else dense
    return own.matmul_transposed(y, w)


# In the order in which "auto" asks them; the reference serves everything and stands last.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "triton": Implementation(triton_matmul.refuses, _few_rows, _transposed),
    "dense": Implementation(dense.refuses, dense.matmul, dense.matmul_transposed),
    "reference": Implementation(lambda x_shape, w: None, reference.matmul, reference.matmul_transposed),
}


def choose_impl(x_shape: tuple[int, ...], w: Weight) -> str:
    """The name of the implementation that `matmul(x, w, impl="auto")` uses; "reference" for dense weights."""
    if not isinstance(w, QuantizedTensor):
        return "reference"
    return next(name for name, impl in IMPLEMENTATIONS.items() if impl.refuses(x_shape, w) is None)


def matmul(x: jax.Array, w: Weight, *, impl: str = "auto") -> jax.Array:
    """x @ w.T: x (..., K) float32, bfloat16 or float16 and w (N, K) give (..., N) in the dtype of x.

    Products are summed in float32. Differentiable in x; packed weights are constants (their gradient is zero), dense
    weights are differentiable too. impl: "auto", or a name in IMPLEMENTATIONS. RealmError if the shapes do not fit,
    or if that implementation cannot serve this format and shape.
    """
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[-1]:
        raise RealmError(f"matmul wants x (..., K) and w (N, K); got x {x.shape} and w {w.shape}")
    if impl == "auto":
        impl = choose_impl(x.shape, w)
    else:
        _check_serves(impl, x.shape, w)
    if isinstance(w, QuantizedTensor):
        return _packed_matmul(impl, x, w)
    return reference.dense_matmul(x, w)


def _check_serves(impl: str, x_shape: tuple[int, ...], w: Weight) -> None:
    """RealmError, naming format and shape, unless that implementation can serve this call."""
    kind = w.format if isinstance(w, QuantizedTensor) else str(w.dtype)
    call = f"impl={impl!r} cannot multiply x {tuple(x_shape)} by {kind} weights {tuple(w.shape)}"
    if impl not in IMPLEMENTATIONS:
        raise RealmError(f"{call}: there is no such implementation; one of auto, {', '.join(IMPLEMENTATIONS)}")
    if not isinstance(w, QuantizedTensor):
        reason = None if impl == "reference" else "it is for packed weights; use auto or reference"
    else:
        reason = IMPLEMENTATIONS[impl].refuses(x_shape, w)
    if reason:
        raise RealmError(f"{call}: {reason}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed_matmul(impl: str, x: jax.Array, w: QuantizedTensor) -> jax.Array:
    return IMPLEMENTATIONS[impl].apply(x, w)


def _packed_matmul_forward(impl: str, x: jax.Array, w: QuantizedTensor) -> tuple[jax.Array, QuantizedTensor]:
    return _packed_matmul(impl, x, w), w  # the packed weights are all that the backward pass needs


def _packed_matmul_backward(impl: str, w: QuantizedTensor, dy: jax.Array) -> tuple[jax.Array, None]:
    return IMPLEMENTATIONS[impl].transposed(dy, w), None


_packed_matmul.defvjp(_packed_matmul_forward, _packed_matmul_backward)
