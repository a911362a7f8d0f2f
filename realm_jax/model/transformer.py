"""The forward pass: tokens in, hidden states and logits out. Pure functions, made to be jitted.

Two steps, because decoding wants logits of one position a row and scoring wants all:
`run` (tokens -> hidden states, cache) and `unembed` (hidden states -> logits).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from realm_jax.model import layers
from realm_jax.model.cache import KVCache
from realm_jax.model.config import Config
from realm_jax.model.params import Params
from realm_jax.model.rope import rope_tables

Observe = Callable[[tuple[str | int, ...], jax.Array], None]  # told of a weight, by its path, and its input (B, T, K)


def run(
    params: Params,
    config: Config,
    tokens_BT: jax.Array,
    cache: KVCache | None = None,
    count_B: jax.Array | None = None,
    observe: Observe | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Hidden states of new tokens, before the final norm: (B, T, D) float32, and the cache with them in it.

    tokens_BT: int32 token ids, padded on the right. count_B: int32, how many of the T are real in
    each row (all, where None); hidden states of the padding mean nothing. Without a cache the tokens
    stand at positions 0..T-1 and see only each other. With one, token t of row b stands at position
    `cache.length_B[b] + t`; the caller sees to it that the real ones fit in `cache.size`. The
    returned cache has `length_B + count_B`; padding is written behind it where there is room, and
    never seen. observe: called while the function is traced, once for every linear weight of the layers, with the path
    of the weight in `Params` and the (traced) activations that it multiplies, padding included.
    """
    B, T = tokens_BT.shape
    start_B = jnp.zeros(B, jnp.int32) if cache is None else cache.length_B
    position_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    rotation = rope_tables(config.rope, params.rope_factors, position_BT)
    x_BTD = layers.embed(params.embedding, tokens_BT)
    row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
    for i, layer in enumerate(params.layers):
        in_attn, in_ffn = (_observe_within(observe, "layers", i, part) for part in ("attn", "ffn"))
        q_BTHC, k_BTKC, v_BTKC = layers.project_qkv(layer.attn, config, x_BTD, rotation, in_attn)
        if cache is None:
            k_BSKC, v_BSKC = k_BTKC, v_BTKC
        else:
            at = (i, row_B1, position_BT)
            cache = cache.replace(
                k=cache.k.at[at].set(k_BTKC.astype(cache.k.dtype), mode="drop"),
                v=cache.v.at[at].set(v_BTKC.astype(cache.v.dtype), mode="drop"),
            )
            k_BSKC, v_BSKC = cache.k[i], cache.v[i]
        x_BTD = x_BTD + layers.attend(layer.attn, config, q_BTHC, k_BSKC, v_BSKC, position_BT, in_attn)
        x_BTD = x_BTD + layers.feed_forward(layer.ffn, config, x_BTD, in_ffn)
    if cache is not None:
        cache = cache.replace(length_B=cache.length_B + (T if count_B is None else count_B))
    return x_BTD, cache


def unembed(params: Params, config: Config, hidden: jax.Array, observe: Observe | None = None) -> jax.Array:
    """Logits of hidden states: (..., D) -> (..., V) float32, through the final norm and the output matrix.

    observe: as in `run`; the path is that of the embedding where it serves as output matrix.
    """
    x = layers.rms_norm(hidden, params.norm, config.norm_eps)
    name = "embedding" if params.output is None else "output"
    if observe is not None:
        observe((name,), x)
    return layers.linear(x, getattr(params, name)).astype(jnp.float32)


def _observe_within(observe: Observe | None, *path: str | int) -> layers.Observe | None:
    """`observe` for the weights below `path`, which know only their own field."""
    return None if observe is None else lambda name, x: observe((*path, name), x)
