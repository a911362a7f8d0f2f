"""The one matrix product of the package: `matmul(x, w)` is x @ w.T for packed or dense weights.

Model code calls `matmul` and nothing else. An implementation is a row of `IMPLEMENTATIONS`; adding a kernel is adding
a row. Weights say in which arithmetic they are multiplied: in "int8" up to MOST_ROWS rows of x become 8-bit integers
first (`reference.int8_steps`); more rows stay as they are. Gradients take no notice of that rounding.

Shape key: `M` rows of x, `N` output features, `K` input features.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from realm_jax.errors import RealmError
from realm_jax.kernels import dense, reference, triton_int8, triton_matmul
from realm_jax.kernels.int8_row import Records
from realm_jax.kernels.operand import Form, Prepared, plain
from realm_jax.kernels.plan import MOST_ROWS, form_of
from realm_jax.quant import QuantizedTensor

Weight = jax.Array | QuantizedTensor


class Implementation(NamedTuple):
    """One way to multiply by packed weights.

    refuses: (x shape, w) -> why it cannot serve that call, or None if it can; decided in Python, from static facts.
    apply: (x (..., K), w (N, K)) -> (..., N) in the dtype of x. transposed: (y (..., N), w) -> (..., K), for gradients.
    """

    refuses: Callable[[tuple[int, ...], QuantizedTensor], str | None]
    apply: Callable[[jax.Array | Prepared, QuantizedTensor], jax.Array]
    transposed: Callable[[jax.Array, QuantizedTensor], jax.Array]


def _few_rows(apply: Callable[..., jax.Array], *, int8: bool) -> Callable[..., jax.Array]:
    """`apply`; under `vmap`, more rows of x are more rows, and other weights for each a loop. int8: its arithmetic."""
    vmapped = custom_vmap(apply)

    @vmapped.def_vmap
    def _(size: int, batched: tuple, x: jax.Array | Prepared, w: QuantizedTensor) -> tuple[jax.Array, bool]:
        x, batched = plain(x), (plain(batched[0]), batched[1])

        def product(pair: tuple) -> jax.Array:
            x, w = pair
            return matmul(x, w if int8 else w.replace(arithmetic="float"))

        if not any(jax.tree.leaves(batched[1])):
            return product((x, w)), batched[0]
        pairs = jax.tree.map(lambda a, own: a if own else jnp.broadcast_to(a, (size, *a.shape)), (x, w), batched)
        return lax.map(product, pairs), True

    return vmapped


def _int8(refuses: Callable[[tuple[int, ...], QuantizedTensor], str | None]) -> Callable:
    """`refuses` of an implementation of int8 arithmetic, which is for weights and rows that ask for it."""

    def own(x_shape: tuple[int, ...], w: QuantizedTensor) -> str | None:
        rows = math.prod(x_shape[:-1])
        if w.arithmetic == "float":
            return 'it is for weights in "int8" arithmetic (Model.with_arithmetic)'
        if w.arithmetic == "int8" and not 1 <= rows <= MOST_ROWS:
            return f"int8 arithmetic takes 1 to {MOST_ROWS} rows, not {rows}"
        return refuses(x_shape, w)

    return own


def _transposed(y: jax.Array, w: QuantizedTensor) -> jax.Array:
    """The gradient of a product by few rows: dense on a GPU, else (in the interpreter) the reference."""
    own = reference if dense.refuses(y.shape, w) else dense
    return own.matmul_transposed(y, w)


# In the order in which "auto" asks them; the reference serves everything and stands last.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "triton_int8": Implementation(
        _int8(triton_int8.refuses), _few_rows(lambda x, w: triton_int8.matmul(x, w), int8=True), _transposed
    ),
    "reference_int8": Implementation(
        _int8(lambda x_shape, w: None), _few_rows(reference.matmul_int8, int8=True), _transposed
    ),
    "triton": Implementation(
        triton_matmul.refuses, _few_rows(lambda x, w: triton_matmul.matmul(x, w), int8=False), _transposed
    ),
    "dense": Implementation(dense.refuses, dense.matmul, dense.matmul_transposed),
    "reference": Implementation(lambda x_shape, w: None, reference.matmul, reference.matmul_transposed),
}


def choose_impl(x_shape: tuple[int, ...], w: Weight) -> str:
    """The name of the implementation that `matmul(x, w, impl="auto")` uses; "reference" for dense weights."""
    if not isinstance(w, QuantizedTensor):
        return "reference"
    return next(name for name, impl in IMPLEMENTATIONS.items() if impl.refuses(x_shape, w) is None)


def wanted_form(x: jax.Array, weights: Sequence[Weight]) -> Form | Records | None:
    """In which form x (..., K) serves most of the products by these weights; None where none of them wants any."""
    impls = [choose_impl(x.shape, w) for w in weights]
    if impls and set(impls) == {"triton_int8"}:
        return triton_int8.form_of(x.shape, weights)
    forms = [form_of(x, w) for w, impl in zip(weights, impls, strict=True) if impl == "triton"]
    return max(forms, key=forms.count, default=None)


def matmul(x: jax.Array | Prepared, w: Weight, *, impl: str = "auto") -> jax.Array:
    """x @ w.T: x (..., K) float32, bfloat16 or float16 and w (N, K) give (..., N) in the dtype of x.

    Products are summed in float32. Differentiable in x; packed weights are constants (their gradient is zero), dense
    weights are differentiable too. x may come prepared for some form: the result is the same to the bit. impl: "auto",
    or a name in IMPLEMENTATIONS. RealmError if the shapes do not fit, or if that implementation cannot serve this
    format and shape.
    """
    prepared, x = x, plain(x)
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[-1]:
        raise RealmError(f"matmul wants x (..., K) and w (N, K); got x {x.shape} and w {w.shape}")
    if impl == "auto":
        impl = choose_impl(x.shape, w)
    else:
        _check_serves(impl, x.shape, w)
    if isinstance(w, QuantizedTensor):
        return _packed_matmul(impl, x, prepared if impl in EACH else x, w)
    return reference.dense_matmul(x, w)


def matmul_each(x: jax.Array | Prepared, weights: Sequence[Weight]) -> list[jax.Array]:
    """`matmul` of x by each of the weights, the same to the bit; in fewer launches where one kernel for few rows serves
    them all."""
    chosen = {choose_impl(x.shape, w) for w in weights}
    impl = chosen.pop() if len(chosen) == 1 else None
    if len(weights) == 1 or impl not in EACH or any(w.shape[-1] != x.shape[-1] for w in weights):
        return [matmul(x, w) for w in weights]
    return list(_packed_matmul_each(impl, plain(x), x, tuple(weights)))


def _each(apply: Callable[..., list[jax.Array]]) -> Callable[..., tuple[jax.Array, ...]]:
    """`apply` of x and a tuple of weights; under `vmap`, `matmul` of each."""
    vmapped = custom_vmap(lambda x, weights: tuple(apply(x, weights)))

    @vmapped.def_vmap
    def _(size: int, batched: tuple, x: jax.Array | Prepared, weights: tuple) -> tuple[tuple[jax.Array, ...], tuple]:
        x_axes, axes = jax.tree.map(lambda own: 0 if own else None, tuple(batched))
        product = functools.partial(jax.vmap, matmul, axis_size=size)
        results = (product((x_axes, w_axes))(x, w) for w, w_axes in zip(weights, axes, strict=True))
        return tuple(results), (True,) * len(weights)

    return vmapped


# What takes x prepared, and several weights at once.
EACH = {"triton": _each(triton_matmul.matmul_each), "triton_int8": _each(triton_int8.matmul_each)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed_matmul_each(
    impl: str, x: jax.Array, prepared: jax.Array | Prepared, weights: tuple
) -> tuple[jax.Array, ...]:
    return EACH[impl](prepared, weights)


def _packed_matmul_each_forward(impl: str, x: jax.Array, prepared: jax.Array | Prepared, weights: tuple) -> tuple:
    return _packed_matmul_each(impl, x, prepared, weights), weights


def _packed_matmul_each_backward(
    impl: str, weights: tuple, changes: tuple[jax.Array, ...]
) -> tuple[jax.Array, None, None]:
    return sum(_transposed(dy, w) for dy, w in zip(changes, weights, strict=True)), None, None


_packed_matmul_each.defvjp(_packed_matmul_each_forward, _packed_matmul_each_backward)


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
def _packed_matmul(impl: str, x: jax.Array, prepared: jax.Array | Prepared, w: QuantizedTensor) -> jax.Array:
    """prepared: x again, as it is read. The derivative is all in x."""
    return IMPLEMENTATIONS[impl].apply(prepared, w)


def _packed_matmul_forward(impl: str, x: jax.Array, prepared: jax.Array | Prepared, w: QuantizedTensor) -> tuple:
    return _packed_matmul(impl, x, prepared, w), w  # the packed weights are all that the backward pass needs


def _packed_matmul_backward(impl: str, w: QuantizedTensor, dy: jax.Array) -> tuple[jax.Array, None, None]:
    return IMPLEMENTATIONS[impl].transposed(dy, w), None, None


_packed_matmul.defvjp(_packed_matmul_forward, _packed_matmul_backward)
