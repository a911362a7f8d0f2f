"""The forward pass: tokens in, hidden states and logits out. Pure functions, made to be jitted.

Two steps, because decoding wants logits of one position a row and scoring wants all:
`run` (tokens -> hidden states, cache) and `unembed` (hidden states -> logits).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from realm_jax.kernels.operand import plain
from realm_jax.kernels.residency import rematerialize
from realm_jax.model import layers
from realm_jax.model.cache import UNBROKEN, KeyValues, KVCache
from realm_jax.model.config import Config
from realm_jax.model.params import Layer, Params
from realm_jax.model.rope import rope_tables, rotate

Observe = Callable[[tuple[str | int, ...], jax.Array], None]  # told of a weight, by its path, and its input (B, T, K)


def run(
    params: Params,
    config: Config,
    tokens_BT: jax.Array,
    cache: KVCache | None = None,
    count_B: jax.Array | None = None,
    *,
    rows_B: jax.Array | None = None,
    deltas: Params | None = None,
    first_BT: jax.Array | None = None,
    dtype: jnp.dtype = jnp.float32,
    remat: bool = False,
    observe: Observe | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Hidden states of new tokens, before the final norm: (B, T, D), and the cache with them in it.

    tokens_BT: int32 token ids, padded on the right. count_B: int32, how many of the T are real in
    each row (all, where None); hidden states of the padding mean nothing. Without a cache the tokens
    stand at positions 0..T-1 and see only each other. With one, token t of row b stands at position
    `cache.length_B[b] + t`; the caller sees to it that the real ones fit in `cache.size`. The
    returned cache has `length_B + count_B`; padding is not written. Hidden states of a token that sees a key or value
    there that is not finite, or too large for the cache's type, are NaN, and those of tokens before it are as ever;
    without a cache, a value that is not finite breaks its whole row.

    rows_B: int32, for a part of the cache's rows: which one each row of tokens belongs to, no two the same; a number
    past the last is for padding (with a count of 0). None: all of them in order. deltas: an adapter fitted to these
    weights: a tree like `params` whose leaves are `Delta`s, tuples of them, or None.
    first_BT: int32, for rows in which documents are packed end to end, without a cache: the place in the row where the
    document of each token begins; a token sees only its own document, and its position counts from there. dtype: of the
    activations between the products. remat: keep only the input of each layer for the backward pass, and compute the
    rest again there. observe: called while the function is traced, once for every linear weight of
    the layers, with the path of the weight in `Params` and the (traced) activations that it multiplies, padding
    included.
    """
    B, T = tokens_BT.shape

    def own(x: jax.Array) -> jax.Array:
        return x if rows_B is None else x.at[rows_B].get(mode="clip")

    start_B = jnp.zeros(B, jnp.int32) if cache is None else own(cache.length_B)
    place_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    position_BT = place_BT if first_BT is None else place_BT - first_BT
    rotation = rope_tables(config.rope, params.rope_factors, position_BT)
    row_B = jnp.arange(B, dtype=jnp.int32) if rows_B is None else rows_B
    if cache is not None:
        count_B = jnp.full(B, T, jnp.int32) if count_B is None else count_B
        write_BT = jnp.where(jnp.arange(T) < count_B[:, None], place_BT, cache.size)
        cache = cache.replace(broken_B=jnp.where(cache.broken_B < cache.length_B, cache.broken_B, UNBROKEN))

    def block(
        i: int,
        x_BTD: jax.Array,
        more_BTD: jax.Array | None,
        layer: Layer,
        change: Layer,
        cache: KVCache | None,
        rotation: layers.Rotation,
        place_BT: jax.Array,
        first_BT: jax.Array | None,
    ) -> tuple:
        """The sum of x and `more` through a layer; again as two, which the next norm adds up."""
        in_attn, in_ffn = (_observe_within(observe, "layers", i, part) for part in ("attn", "ffn"))
        attn, ffn = layer.attn, layer.ffn
        x_BTD, normed_BTD = layers.add_norm(x_BTD, more_BTD, attn.norm, config.norm_eps, (attn.q, attn.k, attn.v))
        q_BTHC, k_BTKC, v_BTKC = layers.project_qkv(attn, config, normed_BTD, change.attn, in_attn)
        halves = config.rope.halves
        if cache is None:
            q_BTHC, k_BTKC = (rotate(x, *rotation, halves) for x in (q_BTHC, k_BTKC))
            out_BTE = layers.attend(q_BTHC, KeyValues(k_BTKC, v_BTKC), place_BT, first_BT).reshape(B, T, -1)
        else:
            at, new = (row_B, rows_B, write_BT, place_BT, first_BT), (q_BTHC, k_BTKC, v_BTKC)
            out_BTE, cache = layers.attend_into(cache, i, *at, new, rotation, halves, attn.o)
        more_BTD = layers.project(out_BTE, attn, "o", change.attn, in_attn)
        x_BTD, normed_BTD = layers.add_norm(x_BTD, more_BTD, ffn.norm, config.norm_eps, (ffn.gate, ffn.up))
        return x_BTD, layers.feed_forward(ffn, normed_BTD, change.ffn, in_ffn), cache

    x_BTD = layers.embed(params.embedding, tokens_BT, None if deltas is None else deltas.embedding).astype(dtype)
    more_BTD = None
    for i, layer in enumerate(params.layers):
        change = Layer(None, None) if deltas is None else deltas.layers[i]
        one = functools.partial(block, i)
        one = rematerialize(one) if remat else one
        x_BTD, more_BTD, cache = one(x_BTD, more_BTD, layer, change, cache, rotation, place_BT, first_BT)
        if remat:  # one array is kept, not two
            x_BTD, more_BTD = x_BTD + more_BTD, None
    x_BTD = x_BTD if more_BTD is None else x_BTD + more_BTD
    if cache is not None:
        x_BTD = jnp.where((place_BT >= own(cache.broken_B)[:, None])[..., None], jnp.nan, x_BTD)
        cache = cache.replace(length_B=cache.length_B.at[row_B].add(count_B, mode="drop"))
    return x_BTD, cache


def unembed(
    params: Params,
    config: Config,
    hidden: jax.Array,
    *,
    deltas: Params | None = None,
    observe: Observe | None = None,
) -> jax.Array:
    """Logits of hidden states: (..., D) -> (..., V) float32, through the final norm and the output matrix.

    deltas, observe: as in `run`. Where the embedding serves as output matrix, its path is what `observe` is told; the
    deltas of the output are `deltas.output` all the same, and those of the embedding change its lookup alone.
    """
    name = "embedding" if params.output is None else "output"
    _, x = layers.add_norm(hidden, None, params.norm, config.norm_eps, (getattr(params, name),))
    if observe is not None:
        observe((name,), plain(x))
    own = None if deltas is None else deltas.output
    return layers.linear(x, getattr(params, name), deltas=own).astype(jnp.float32)


def _observe_within(observe: Observe | None, *path: str | int) -> layers.Observe | None:
    """`observe` for the weights below `path`, which know only their own field."""
    return None if observe is None else lambda name, x: observe((*path, name), x)
