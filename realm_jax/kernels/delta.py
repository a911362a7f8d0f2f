"""What an adapter adds to one product: low-rank deltas beside a weight that stays as it is. Called by `model.layers`.

A `Delta` is LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): a weight w (N, K) acts as w + scale * b @ a. With
a magnitude it is DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353): each row of that is brought to a length of
its own. Neither ever needs w in floating point: both are what is added to x @ w.T.

Shape suffixes: `N` output features, `K` input features, `R` rank, `B` batch rows.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.errors import AdapterError
from realm_jax.kernels.matmul import Weight, matmul
from realm_jax.kernels.reference import matmul_transposed
from realm_jax.quant.tensor import QuantizedTensor

HIGHEST = lax.Precision.HIGHEST


@flax.struct.dataclass
class Delta:
    """The change of one weight (N, K): scale * b @ a, and for DoRA a new length for each output.

    a (..., R, K), b (..., N, R), scale (...): float. Leading axes: none, or one (B,) that gives each row of the batch a
    delta of its own. scale: everything that multiplies b @ a: alpha / rank (alpha / sqrt(rank) for rsLoRA) times
    the user's factor. magnitude (..., N) or None: DoRA's. norms (..., 3, N) or None: what `dora_norms` gives for this
    delta and its weight; a delta with a magnitude cannot act without. For an embedding (V, D) both are of
    its D columns.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    magnitude: jax.Array | None = None
    norms: jax.Array | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


Deltas = Delta | tuple[Delta, ...] | None
"""What one weight may have: nothing, a delta, or several that act together."""


def add_deltas(y: jax.Array, x: jax.Array, deltas: Deltas) -> jax.Array:
    """y = x @ w.T with what the deltas of w add to it: x (..., K), y (..., N), in the dtype of y.

    Sums are taken in float32. A delta that adds zero leaves every bit as it was. Several deltas add up, each on its own
    (as PEFT has it). Where a delta has a leading axis (B,), it is the first axis of x.
    """
    total = y
    for delta in _listed(deltas):
        own_x = lax.optimization_barrier(x)  # else XLA's GPU backend joins the products by w and by a into one
        part = _over_tokens(delta.scale[..., None], x.ndim) * _einsum("...k,rk->...r", own_x, delta.a)
        total = _add(total, _scaled(delta, _einsum("...r,nr->...n", part.astype(x.dtype), delta.b), y))
    return total


def add_embedding_deltas(y: jax.Array, tokens: jax.Array, deltas: Deltas) -> jax.Array:
    """y = w[tokens] of an embedding w (V, D) with what its deltas add: tokens (B, ...) int32, y (B, ..., D)."""
    total = y
    for delta in _listed(deltas):
        rows = delta.b[tokens] if delta.b.ndim == 2 else jax.vmap(lambda b, t: b[t])(delta.b, tokens)
        part = _over_tokens(delta.scale[..., None], rows.ndim) * rows.astype(jnp.float32)
        total = _add(total, _scaled(delta, _einsum("...r,rk->...k", part, delta.a), y))
    return total


def dora_norms(w: Weight, delta: Delta, *, embedding: bool = False, squared_N: jax.Array | None = None) -> jax.Array:
    """What the lengths of w + scale * b @ a follow from, float32 (3, N): |w|^2, w.(b a), |b a|^2 of each output row.

    The length is sqrt(n0 + 2 scale n1 + scale^2 n2), whatever the scale. Of packed weights only a product is taken, a
    stripe at a time. embedding: of the columns of w (V, D), float32 (3, D), as PEFT has it. squared_N: |w|^2, if known.
    """
    a_RK, b_NR = delta.a.astype(jnp.float32), delta.b.astype(jnp.float32)
    if embedding:
        a_RK, b_NR = b_NR.T, a_RK.T  # the delta of w.T
        crossed_RN = matmul_transposed(a_RK, w) if isinstance(w, QuantizedTensor) else _dot(a_RK, w.astype(jnp.float32))
    else:
        crossed_RN = matmul(a_RK, w.replace(arithmetic="float") if isinstance(w, QuantizedTensor) else w)
    gram_RR = _dot(a_RK, a_RK.T)
    crossed_N = jnp.einsum("rn,nr->n", crossed_RN, b_NR, precision=HIGHEST)
    own_N = jnp.einsum("nr,nr->n", _dot(b_NR, gram_RR), b_NR, precision=HIGHEST)
    squared_N = squared_norms(w, columns=embedding) if squared_N is None else squared_N
    return jnp.stack([squared_N, crossed_N, own_N])


def squared_norms(w: Weight, *, columns: bool = False) -> jax.Array:
    """|w|^2 of each row of w (N, K), float32 (N,); of each column, (K,), if `columns`. Packed weights: by stripes."""
    if not isinstance(w, QuantizedTensor):
        return jnp.sum(jnp.square(w.astype(jnp.float32)), 0 if columns else 1)
    rows = max(1, (1 << 20) // w.shape[1])
    axis, sums = 0 if columns else 1, []
    for i in range(0, w.shape[0], rows):  # one stripe after another: no two stand in float32 at once
        part = jax.tree.map(lambda plane, i=i: plane[i : i + rows], w)
        sums.append(jnp.sum(jnp.square(part.dequantize()), axis))
    return sum(sums) if columns else jnp.concatenate(sums)


def dora_factor(delta: Delta) -> jax.Array:
    """magnitude / |w + scale b a|, (..., N) float32; the length is taken as a constant by gradients (section 4.3)."""
    if delta.norms is None:
        raise AdapterError("a DoRA adapter must be fitted to its base model before it is applied: use lora.fit")
    n0, n1, n2 = (delta.norms[..., i, :] for i in range(3))
    scale = lax.stop_gradient(delta.scale).astype(jnp.float32)[..., None]
    squared = jnp.maximum(n0 + 2 * scale * n1 + scale * scale * n2, 0)
    length = jnp.sqrt(lax.stop_gradient(squared))
    safe = jnp.where(length > 0, length, 1)
    # Square roots and divisions on a GPU may be off by a bit or two, and a product that is taken off again by a part of
    # one; a length that has not changed must change nothing. Its gradient is that of the quotient.
    unchanged = jnp.abs(delta.magnitude - length) <= 4 * jnp.finfo(jnp.float32).eps * length
    one = 1 + (delta.magnitude - lax.stop_gradient(delta.magnitude)) / safe
    return jnp.where(length > 0, jnp.where(unchanged, one, delta.magnitude / safe), 0)


def _listed(deltas: Deltas) -> tuple[Delta, ...]:
    if deltas is None:
        return ()
    return deltas if isinstance(deltas, tuple) else (deltas,)


def _scaled(delta: Delta, added: jax.Array, y: jax.Array) -> jax.Array:
    """What is to be added to y: `added`, and for DoRA the change of length of both."""
    if delta.magnitude is None:
        return added
    factor = _over_tokens(dora_factor(delta), y.ndim)
    return (factor - 1) * y.astype(jnp.float32) + factor * added


def _over_tokens(x: jax.Array, ndim: int) -> jax.Array:
    """x (F,) or (B, F) in float32, ready to meet (B, ..., F): between row and features stand the axes of the tokens."""
    x = x.astype(jnp.float32)
    return x if x.ndim < 2 else x.reshape(x.shape[0], *[1] * (ndim - 2), x.shape[-1])


def _einsum(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """The product in float32, of 16-bit numbers where x has 16 bits; `w` may have a leading axis that is x's first."""
    if w.ndim == 3:
        left, right = spec.split(",")
        spec = f"b{left},b{right.replace('->', '->b')}"
    return jnp.einsum(spec, x, w.astype(x.dtype), precision=HIGHEST, preferred_element_type=jnp.float32)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x, y, precision=HIGHEST)


@jax.custom_jvp
def _add(y: jax.Array, added: jax.Array) -> jax.Array:
    """y + added in the dtype of y, where -0 + 0 is -0: adding nothing changes nothing."""
    return jnp.where(added == 0, y, (y.astype(jnp.float32) + added).astype(y.dtype))


@_add.defjvp
def _add_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (y, added), (dy, d_added) = primals, tangents
    return _add(y, added), dy + d_added.astype(dy.dtype)
