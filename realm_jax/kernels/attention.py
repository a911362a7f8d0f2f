"""Attention over a padded ragged cache. One public function; called by `model.layers`."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def attention(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    place_BT: jax.Array,
    first_BT: jax.Array | None = None,
    *,
    scale: float,
    k_scale_BSK: jax.Array | None = None,
    v_scale_BSK: jax.Array | None = None,
) -> jax.Array:
    """Causal grouped-query attention: the query at place p sees the keys at places 0..p of its row.

    q_BTHC: queries; head h reads kv head h // (H / K). k_BSKC, v_BSKC: key j of a row is its token at
    place j; what lies after a row's last token may be anything finite. place_BT: int32, the place of
    each query. first_BT: int32, the first place that each query sees, or None: 0. scale: multiplies
    the scores. k_scale_BSK, v_scale_BSK: float32, of keys and values that are int8; they multiply scores and weights,
    which are fewer than keys and values where a row has few queries. Returns (B, T, H, C) in q's dtype; scores
    and softmax are float32. Source: Vaswani et al. 2017; Ainslie et al. 2023 (grouped queries).
    """
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
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS * scale, -jnp.inf)
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
