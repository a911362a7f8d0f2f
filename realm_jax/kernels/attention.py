"""Attention over a padded ragged cache. One public function; called by `model.layers`."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def attention(
    q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, position_BT: jax.Array, *, scale: float
) -> jax.Array:
    """Causal grouped-query attention: the query at position p sees the keys at positions 0..p of its row.

    q_BTHC: queries; head h reads kv head h // (H / K). k_BSKC, v_BSKC: key j of a row is its token at
    position j; what lies after a row's last token may be anything finite. position_BT: int32, the
    position of each query. scale: multiplies the scores. Returns (B, T, H, C) in q's dtype; scores
    and softmax are float32. Source: Vaswani et al. 2017; Ainslie et al. 2023 (grouped queries).
    """
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
    scores_BKGTS = jnp.einsum(
        "BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC.astype(q_BTHC.dtype), precision=HIGHEST, preferred_element_type=jnp.float32
    )
    visible_BTS = jnp.arange(S, dtype=jnp.int32)[None, None, :] <= position_BT[:, :, None]
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS * scale, -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(q_BTHC.dtype)
    out_BTKGC = jnp.einsum(
        "BKGTS,BSKC->BTKGC",
        weights_BKGTS,
        v_BSKC.astype(q_BTHC.dtype),
        precision=HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return out_BTKGC.reshape(B, T, H, C).astype(q_BTHC.dtype)
