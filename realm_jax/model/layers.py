"""The pieces of a transformer block, as pure functions of (weights, activations).

Shape suffixes: `B` rows, `T` new tokens, `S` cache length, `D` width, `F` ffn width, `H` query heads,
`K` kv heads, `C` head width, `E` = H C, `V` vocabulary. Called by `model.transformer`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from realm_jax.kernels import triton_attention, triton_cache, triton_gate, triton_norm
from realm_jax.kernels.attention import attention
from realm_jax.kernels.delta import Deltas, add_deltas, add_embedding_deltas
from realm_jax.kernels.int8_row import Records
from realm_jax.kernels.matmul import matmul, matmul_each, wanted_form
from realm_jax.kernels.operand import Form, Prepared, plain, with_operand
from realm_jax.model.cache import KeyValues, KVCache
from realm_jax.model.config import Config
from realm_jax.model.params import Attention, FeedForward, Weight
from realm_jax.model.rope import rotate
from realm_jax.quant.tensor import QuantizedTensor

Rotation = tuple[jax.Array, jax.Array]  # cosine and sine, (B, T, C / 2)
Observe = Callable[[str, jax.Array], None]  # told, while tracing, a weight's field and its input (B, T, K)


def by_kernel(kernel: Callable, reference: Callable) -> Callable:
    """`kernel(static, *arrays)`, whose derivatives are those of the reference, and for which a vmap is a loop.

    Both give tuples; what the kernel gives beyond those of the reference has no derivative.
    """

    def run(static: Any, *arrays: Any) -> Any:
        return jax.custom_batching.sequential_vmap(functools.partial(kernel, static))(*arrays)

    def backward(static: Any, arrays: tuple, changes: Any) -> tuple:
        known, pull = jax.vjp(functools.partial(reference, static), *arrays)
        return pull(changes[: len(known)])

    run = jax.custom_vjp(run, nondiff_argnums=(0,))
    run.defvjp(lambda static, *arrays: (run(static, *arrays), arrays), backward)
    return run


def embed(w_VD: Weight, tokens_BT: jax.Array, deltas: Deltas = None) -> jax.Array:
    """Rows of the embedding, float32 (B, T, D); only the rows asked for are dequantized."""
    x_BTD = w_VD.take(tokens_BT) if isinstance(w_VD, QuantizedTensor) else w_VD[tokens_BT].astype(jnp.float32)
    return add_embedding_deltas(x_BTD, tokens_BT, deltas)


def linear(x: jax.Array | Prepared, w: Weight, bias: jax.Array | None = None, deltas: Deltas = None) -> jax.Array:
    """x @ w.T with what its deltas add, + bias: x (..., K), w (N, K) in any format, bias (N,) or None."""
    return _finished(matmul(x, w), x, bias, deltas)


def _finished(y: jax.Array, x: jax.Array | Prepared, bias: jax.Array | None, deltas: Deltas) -> jax.Array:
    """A product y of x, with what its deltas add, + bias."""
    # The barrier keeps what follows out of the product, so that its bits are the same with deltas and without.
    y = add_deltas(jax.lax.optimization_barrier(y), plain(x), deltas)
    return y if bias is None else y + bias.astype(y.dtype)


def project(
    x: jax.Array | Prepared,
    weights: Attention | FeedForward,
    name: str,
    deltas: Attention | FeedForward | None = None,
    observe: Observe | None = None,
) -> jax.Array:
    """The linear weight `name` of a block, its deltas and its bias, applied to x (..., K).

    deltas: the same block of an adapter's tree. observe: is told of x first.
    """
    return project_each(x, weights, (name,), deltas, observe)[0]


def project_each(
    x: jax.Array | Prepared,
    weights: Attention | FeedForward,
    names: tuple[str, ...],
    deltas: Attention | FeedForward | None = None,
    observe: Observe | None = None,
) -> list[jax.Array]:
    """`project` of the same x by several weights of a block, in fewer launches where a kernel can."""
    if observe is not None:
        for name in names:
            observe(name, plain(x))
    changes = [None if deltas is None else getattr(deltas, name) for name in names]
    products = matmul_each(x, [getattr(weights, name) for name in names])
    return [
        _finished(y, x, getattr(weights, f"{name}_bias"), change)
        for y, name, change in zip(products, names, changes, strict=True)
    ]


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32 (Zhang and Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


def add_norm(
    x: jax.Array, more: jax.Array | None, weight: jax.Array, eps: float, readers: Sequence[Weight] = ()
) -> tuple[jax.Array, jax.Array | Prepared]:
    """x + more (x, where it is None), and the norm of that; in one launch where `kernels.triton_norm` can serve.

    readers: the weights that will multiply the norm. That launch prepares it for them.
    """
    if triton_norm.refuses(x) is not None:
        return _add_norm((eps, None), x, more, weight)
    form = wanted_form(x, readers)
    total, normed, operand = _add_norm_in_one_launch((eps, form), x, more, weight)
    return total, with_operand(normed, operand, form)


def _add_norm(static: tuple, x: jax.Array, more: jax.Array | None, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`add_norm` as XLA has it. It says what is right."""
    x = x if more is None else x + more
    return x, rms_norm(x, weight, static[0])


def _add_norm_by_kernel(static: tuple, x: jax.Array, more: jax.Array | None, weight: jax.Array) -> tuple:
    eps, form = static
    return triton_norm.add_norm(x, more, weight, eps=eps, form=form)


_add_norm_in_one_launch = by_kernel(_add_norm_by_kernel, _add_norm)


def gated(gate: jax.Array, up: jax.Array, reader: Weight) -> jax.Array | Prepared:
    """silu(gate) * up, which `reader` will multiply; prepared for it in one launch where it wants that, of few rows."""
    form = None if triton_norm.refuses(gate) else wanted_form(gate, [reader])
    if form is None:
        return _gated(None, gate, up)[0]
    return with_operand(*_gated_in_one_launch(form, gate, up), form)


def _gated(form: Form | Records | None, gate: jax.Array, up: jax.Array) -> tuple[jax.Array]:
    """`gated` as XLA has it. It says what is right."""
    return (jax.nn.silu(gate) * up,)


def _gated_by_kernel(form: Form | Records, gate: jax.Array, up: jax.Array) -> tuple:
    return triton_gate.gated(gate, up, form=form)


_gated_in_one_launch = by_kernel(_gated_by_kernel, _gated)


def project_qkv(
    w: Attention,
    config: Config,
    x_BTD: jax.Array | Prepared,
    deltas: Attention | None = None,
    observe: Observe | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normed input -> queries (B, T, H, C), keys and values (B, T, K, C), none of them rotated."""
    B, T, _ = x_BTD.shape
    C = config.head_width
    q, k, v = project_each(x_BTD, w, ("q", "k", "v"), deltas, observe)
    return q.reshape(B, T, config.heads, C), *(y.reshape(B, T, config.kv_heads, C) for y in (k, v))


def rotate_into(
    cache: KVCache,
    layer: int,
    row_B: jax.Array,
    place_BT: jax.Array,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    rotation: Rotation,
    halves: bool,
) -> tuple[jax.Array, KVCache]:
    """Rotated queries, and the cache with the rotated keys and the values of new tokens; as in `KVCache.write`.

    In one launch where `kernels.triton_cache` can serve.
    """
    one = _in_one_launch if triton_cache.refuses(q_BTHC, cache.k) is None else _rotate_and_write
    return one((layer, halves), cache, row_B, place_BT, q_BTHC, k_BTKC, v_BTKC, rotation)


def _rotate_and_write(static: tuple, cache, row_B, place_BT, q_BTHC, k_BTKC, v_BTKC, rotation) -> tuple:
    """`rotate_into` as XLA has it. It says what is right."""
    layer, halves = static
    q_BTHC, k_BTKC = (rotate(x, *rotation, halves) for x in (q_BTHC, k_BTKC))
    return q_BTHC, cache.write(layer, row_B, place_BT, k_BTKC, v_BTKC)


def _write_by_kernel(static: tuple, cache, row_B, place_BT, q_BTHC, k_BTKC, v_BTKC, rotation) -> tuple:
    layer, halves = static
    at, new = (jnp.int32(layer), row_B, place_BT), (q_BTHC, k_BTKC, v_BTKC)
    q_BTHC, arrays = triton_cache.write(_arrays(cache), *at, *new, *rotation, halves=halves)
    return q_BTHC, cache.replace(**arrays._asdict())


def _arrays(cache: KVCache) -> triton_cache.Arrays:
    return triton_cache.Arrays(cache.k, cache.v, cache.broken_B, cache.k_scale, cache.v_scale)


_in_one_launch = by_kernel(_write_by_kernel, _rotate_and_write)


def attend(
    q_BTHC: jax.Array, kv: KeyValues, place_BT: jax.Array, first_BT: jax.Array | None = None, impl: str = "auto"
) -> jax.Array:
    """Attention of rotated queries, (B, T, H, C). impl: as in `kernels.attention`."""
    return attention(
        q_BTHC,
        kv.k,
        kv.v,
        place_BT,
        first_BT,
        scale=q_BTHC.shape[-1] ** -0.5,
        k_scale_BSK=kv.k_scale,
        v_scale_BSK=kv.v_scale,
        layer=kv.layer,
        rows_B=kv.rows_B,
        window=kv.window,
        impl=impl,
    )


def attend_into(
    cache: KVCache,
    layer: int,
    row_B: jax.Array,
    rows_B: jax.Array | None,
    write_BT: jax.Array,
    place_BT: jax.Array,
    first_BT: jax.Array | None,
    new: tuple[jax.Array, jax.Array, jax.Array],
    rotation: Rotation,
    halves: bool,
    reader: Weight,
) -> tuple[jax.Array | Prepared, KVCache]:
    """Attention of new tokens to a cache with them in it, (B, T, E), and that cache.

    row_B: the rows of the cache that they belong to; rows_B: again, None where these are all in order. write_BT,
    place_BT: the places that they are written to, as in `KVCache.write`, and that their queries stand at. new: their
    queries, keys and values, not rotated. Without a launch for the cache where `triton_attention.write_and_attend` can
    serve. reader: the weight that will multiply it, for which that may prepare it.
    """
    B, T, H, C = new[0].shape
    out_BTE = jax.ShapeDtypeStruct((B, T, H * C), new[0].dtype)
    if first_BT is None and triton_attention.refuses_new(new[0], cache.k) is None:
        form = wanted_form(out_BTE, [reader])
        form = form if isinstance(form, Records) else None
        static, at = (layer, halves, form), (row_B, write_BT, place_BT)
        out_BTHC, cache, made = _attend_in_one_launch(static, cache, *at, *new, rotation)
        return with_operand(out_BTHC.reshape(out_BTE.shape), made, form), cache
    q_BTHC, cache = rotate_into(cache, layer, row_B, write_BT, *new, rotation, halves)
    return attend(q_BTHC, cache.read(layer, rows_B), place_BT, first_BT).reshape(out_BTE.shape), cache


def _write_and_attend(static: tuple, cache, row_B, write_BT, place_BT, q_BTHC, k_BTKC, v_BTKC, rotation) -> tuple:
    """`attend_into` as XLA has it. It says what is right."""
    q_BTHC, cache = _rotate_and_write(static[:2], cache, row_B, write_BT, q_BTHC, k_BTKC, v_BTKC, rotation)
    return attend(q_BTHC, cache.read(static[0], row_B), place_BT, impl="reference"), cache


def _attend_by_kernel(static: tuple, cache, row_B, write_BT, place_BT, q_BTHC, k_BTKC, v_BTKC, rotation) -> tuple:
    layer, halves, form = static
    at, new = (jnp.int32(layer), row_B, write_BT, place_BT), (q_BTHC, k_BTKC, v_BTKC)
    options = {"scale": q_BTHC.shape[-1] ** -0.5, "window": cache.window, "softcap": None, "sliding_window": None}
    options |= {"halves": halves, "form": form}
    out_BTHC, arrays, made = triton_attention.write_and_attend(_arrays(cache), *at, *new, *rotation, **options)
    return out_BTHC, cache.replace(**arrays._asdict()), made


_attend_in_one_launch = by_kernel(_attend_by_kernel, _write_and_attend)


def feed_forward(
    w: FeedForward,
    x_BTD: jax.Array | Prepared,
    deltas: FeedForward | None = None,
    observe: Observe | None = None,
) -> jax.Array:
    """Normed input -> gated feed-forward network with SiLU (Shazeer 2020), (B, T, D)."""
    gate_BTF, up_BTF = project_each(x_BTD, w, ("gate", "up"), deltas, observe)
    return project(gated(gate_BTF, up_BTF, w.down), w, "down", deltas, observe)
