"""Attention over a padded ragged cache. One public function, several implementations; called by `model.layers`."""

import functools

import jax
import jax.numpy as jnp

from realm_jax.errors import RealmError
from realm_jax.kernels import attention_plan, pallas, triton_attention

HIGHEST = jax.lax.Precision.HIGHEST
IMPLEMENTATIONS = ("triton", "reference")  # in the order in which "auto" asks them


def attention(
    q_BTHC: jax.Array,
    k: jax.Array,
    v: jax.Array,
    place_BT: jax.Array,
    first_BT: jax.Array | None = None,
    *,
    scale: float,
    k_scale_BSK: jax.Array | None = None,
    v_scale_BSK: jax.Array | None = None,
    layer: int | jax.Array | None = None,
    rows_B: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Causal grouped-query attention: the query at place p sees the keys at places 0..p of its row.

    q_BTHC: queries; head h reads kv head h // (H / K). k, v (B, S, K, C): key j of a row is its token at place j; what
    lies after a row's last token may be anything finite. Or, with `layer`, (L, B, S, K, C): all layers of a cache, of
    which this one is read. place_BT: int32, the place of each query. first_BT: int32, the first place that each query
    sees, or None: 0. scale: multiplies the scores. k_scale_BSK, v_scale_BSK: float32 (with `layer`: (L, B, S, K)), of
    keys and values that are int8; they multiply scores and weights, which are fewer than keys and values where a row
    has few queries. rows_B: int32, with `layer`: the row of the cache that belongs to each row of queries, clipped to
    those that there are (all in order, where None). window: the first so many places of a row are read only. softcap:
    scores are softcap * tanh(score / softcap). sliding_window: a query sees the last so many of its places only.

    impl: "auto" (see `choose_attention`), "reference" or "triton"; RealmError if that one cannot serve the call.
    Returns (B, T, H, C) in q's dtype; scores and softmax are float32. Source: Vaswani et al. 2017; Ainslie et al. 2023
    (grouped queries); Gemma Team 2024 (soft-cap, sliding window).
    """
    if impl == "auto":
        impl = choose_attention(q_BTHC, k, layer, first_BT)
    elif reason := _refuses(impl, q_BTHC, k, first_BT):
        shapes = f"queries {q_BTHC.shape} of {q_BTHC.dtype} to keys {k.shape} of {k.dtype}"
        raise RealmError(f"impl={impl!r} cannot attend {shapes}: {reason}")
    arrays = (q_BTHC, k, v, k_scale_BSK, v_scale_BSK, place_BT, rows_B)
    options = (scale, window, softcap, sliding_window)
    if impl == "reference":
        return _reference(options, layer, first_BT, *arrays)
    return _triton(options, 0 if layer is None else layer, *arrays)


def choose_attention(
    q_BTHC: jax.Array, k: jax.Array, layer: int | jax.Array | None = None, first_BT: jax.Array | None = None
) -> str:
    """The name of the implementation that `attention(..., impl="auto")` uses for such arguments.

    Triton where a CUDA backend (or the interpreter, in tests) is there, a cache is read (`layer`), and the kernel can
    serve. Without a cache, as in training, the reference: it has every kind of derivative.
    """
    served = layer is not None and pallas.available() and _refuses("triton", q_BTHC, k, first_BT) is None
    return "triton" if served else "reference"


def _refuses(impl: str, q_BTHC: jax.Array, k: jax.Array, first_BT: jax.Array | None) -> str | None:
    """Why that implementation cannot serve the call, or None."""
    if impl == "reference":
        return None
    if impl not in IMPLEMENTATIONS:
        return f"there is no such implementation; one of auto, {', '.join(IMPLEMENTATIONS)}"
    if not pallas.available():
        return f"it needs a CUDA backend, and JAX runs on {jax.default_backend()}; use auto or reference"
    if first_BT is not None:
        return "it knows nothing of first_BT (documents packed end to end); use auto or reference"
    return attention_plan.refuses(q_BTHC, k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _triton(options: tuple, layer, q_BTHC, k, v, k_scale, v_scale, place_BT, rows_B) -> jax.Array:
    """As `_reference`; what a vmap adds becomes a loop."""
    scale, window, softcap, sliding_window = options
    if rows_B is None:
        rows_B = jnp.arange(q_BTHC.shape[0], dtype=jnp.int32)
    k, v, k_scale, v_scale = (x if x is None or k.ndim == 5 else x[None] for x in (k, v, k_scale, v_scale))
    run = functools.partial(
        triton_attention.attend, scale=scale, window=window, softcap=softcap, sliding_window=sliding_window
    )
    layer = jnp.asarray(layer, jnp.int32)
    return jax.custom_batching.sequential_vmap(run)(q_BTHC, k, v, place_BT, layer, rows_B, k_scale, v_scale)


def _triton_forward(options: tuple, *arrays) -> tuple[jax.Array, tuple]:
    return _triton(options, *arrays), arrays


def _triton_backward(options: tuple, arrays: tuple, dout_BTHC: jax.Array) -> tuple:
    layer, *arrays = arrays
    _, pull = jax.vjp(functools.partial(_reference, options, layer, None), *arrays)
    return None, *pull(dout_BTHC)


_triton.defvjp(_triton_forward, _triton_backward)


def _reference(options: tuple, layer, first_BT, q_BTHC, k, v, k_scale_BSK, v_scale_BSK, place_BT, rows_B) -> jax.Array:
    """`attention` as XLA has it: all scores at once. It says what is right."""
    scale, window, softcap, sliding_window = options

    def part(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        x = x[:, :window] if layer is None else x[layer, :, :window]
        return x if rows_B is None else x.at[rows_B].get(mode="clip")

    k_BSKC, v_BSKC, k_scale_BSK, v_scale_BSK = map(part, (k, v, k_scale_BSK, v_scale_BSK))
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
    scores_BKGTS = jnp.einsum(
        "BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC.astype(q_BTHC.dtype), precision=HIGHEST, preferred_element_type=jnp.float32
    )
    if k_scale_BSK is not None:
        scores_BKGTS *= _by_head(k_scale_BSK)
    place_S = jnp.arange(S, dtype=jnp.int32)
    visible_BTS = place_S <= place_BT[:, :, None]
    if first_BT is not None:
        visible_BTS &= place_S >= first_BT[:, :, None]
    if sliding_window is not None:
        visible_BTS &= place_S > place_BT[:, :, None] - sliding_window
    scores_BKGTS *= scale
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    if v_scale_BSK is not None:
        weights_BKGTS *= _by_head(v_scale_BSK)
    weights_BKGTS = weights_BKGTS.astype(q_BTHC.dtype)
    out_BTKGC = jnp.einsum(
        "BKGTS,BSKC->BTKGC",
        weights_BKGTS,
        v_BSKC.astype(q_BTHC.dtype),
        precision=HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return out_BTKGC.reshape(B, T, H, C).astype(q_BTHC.dtype)


def _by_head(scale_BSK: jax.Array) -> jax.Array:
    """Scales as they meet scores: (B, S, K) -> (B, K, 1, 1, S)."""
    return scale_BSK.transpose(0, 2, 1)[:, :, None, None]
