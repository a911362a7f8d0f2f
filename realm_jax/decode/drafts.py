"""Drafts: what proposes tokens for speculative decoding, on the device. Called by `decode.speculative`.

A draft is a model with the target's vocabulary (another file, or the target itself in a cheaper format), or n-grams:
what followed the last time that the row's last tokens stood there (prompt lookup, Saxena 2023,
https://github.com/apoorvumang/prompt-lookup-decoding).

Shapes: B rows, S tokens a row can hold, V vocabulary, G draft tokens a round.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from realm_jax.decode import sampling
from realm_jax.decode.loop import DecodeState
from realm_jax.model.cache import KVCache
from realm_jax.model.config import Config
from realm_jax.model.params import Params
from realm_jax.model.transformer import run, unembed

DRAW = 0xD4AF  # folded into a row's key for the draft's draws, which must not be those of the target
LONGEST_NGRAM = 3


@struct.dataclass
class Draft:
    """What proposes tokens. params: of a draft model, None for n-grams; deltas: of its adapter, or None.

    cost: float32 scalar, the time of one draft token over that of one step of the target. config: static, the draft
    model's. tokens: static, G, the most that it proposes in a round. adaptive: static, whether rows choose fewer, or
    none, by their acceptance.
    """

    params: Params | None
    deltas: Params | None
    cost: jax.Array
    config: Config | None = struct.field(pytree_node=False)
    tokens: int = struct.field(pytree_node=False)
    adaptive: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Proposal:
    """tokens_BS: the rows' tokens with the proposed ones behind them. count_B: int32, how many are proposed.

    log_q_BGV: the distributions that they were drawn from; what lies behind `count_B` means nothing.
    """

    tokens_BS: jax.Array
    count_B: jax.Array
    log_q_BGV: jax.Array

    def drafted(self, length_B: jax.Array) -> jax.Array:
        """The proposed tokens, (B, G), of rows that are `length_B` long."""
        place_BG = length_B[:, None] + jnp.arange(self.log_q_BGV.shape[1])
        return jnp.take_along_axis(self.tokens_BS, jnp.minimum(place_BG, self.tokens_BS.shape[1] - 1), axis=1)


def propose(
    draft: Draft, vocab_size: int, rows: DecodeState, cache: KVCache | None, propose_B: jax.Array
) -> tuple[Proposal, KVCache | None]:
    """Up to G tokens for every ready row, and the draft's cache with all that it has run in it.

    propose_B: how many of them count. No row is proposed a token behind the end of its buffer.
    """
    room_B = rows.limit_B - rows.length_B - 1  # the last token is always the target's own
    count_B = jnp.where(rows.ready_B, jnp.clip(room_B, 0, propose_B), 0)
    if draft.params is None:
        return _lookup(draft.tokens, vocab_size, rows, count_B), None
    return _run_model(draft, rows, cache, count_B)


def _run_model(draft: Draft, rows: DecodeState, cache: KVCache, count_B: jax.Array) -> tuple[Proposal, KVCache]:
    """One forward pass of the draft model a token. The first takes what the draft has not seen: one token or two."""
    B, S = rows.tokens_BS.shape
    V, row_B = draft.config.vocab_size, jnp.arange(B)
    active_B = count_B > 0
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, DRAW))(rows.keys_B)

    def write(
        i: jax.Array, hidden_BD: jax.Array, tokens_BS: jax.Array, log_q_BGV: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The draft's token i, drawn by the row's own rules."""
        place_B = rows.length_B + i
        past = sampling.past(rows.params, tokens_BS, rows.prompt_length_B, place_B, V)
        logits_BV = unembed(draft.params, draft.config, hidden_BD, deltas=draft.deltas)
        log_q_BV = sampling.log_distribution(logits_BV, rows.params, past)
        if rows.params.sample:
            token_B = sampling.draw(log_q_BV, keys_B, place_B)
        else:
            token_B = jnp.argmax(log_q_BV, axis=-1).astype(jnp.int32)
        at = (row_B, jnp.where(i < count_B, place_B, S))
        return tokens_BS.at[at].set(token_B, mode="drop"), log_q_BGV.at[:, i].set(log_q_BV)

    missing_B = jnp.clip(rows.length_B - cache.length_B, 1, 2)
    place_B2 = (rows.length_B - missing_B)[:, None] + jnp.arange(2)
    tokens_B2 = jnp.take_along_axis(rows.tokens_BS, jnp.minimum(place_B2, S - 1), axis=1)
    cache = cache.replace(length_B=jnp.where(active_B, rows.length_B - missing_B, cache.length_B))
    hidden_B2D, cache = run(
        draft.params, draft.config, tokens_B2, cache, jnp.where(active_B, missing_B, 0), deltas=draft.deltas
    )
    hidden_BD = jnp.take_along_axis(hidden_B2D, (missing_B - 1)[:, None, None], axis=1)[:, 0]
    tokens_BS, log_q_BGV = write(jnp.int32(0), hidden_BD, rows.tokens_BS, jnp.zeros((B, draft.tokens, V)))

    def one(i: jax.Array, carry: tuple) -> tuple:
        tokens_BS, log_q_BGV, cache = carry
        last_B1 = jnp.take_along_axis(tokens_BS, jnp.minimum(rows.length_B + i - 1, S - 1)[:, None], axis=1)
        on_B = (i < count_B).astype(jnp.int32)
        hidden_B1D, cache = run(draft.params, draft.config, last_B1, cache, on_B, deltas=draft.deltas)
        return *write(i, hidden_B1D[:, 0], tokens_BS, log_q_BGV), cache

    tokens_BS, log_q_BGV, cache = lax.fori_loop(1, jnp.max(count_B), one, (tokens_BS, log_q_BGV, cache))
    return Proposal(tokens_BS, count_B, log_q_BGV), cache


def _lookup(G: int, vocab_size: int, rows: DecodeState, count_B: jax.Array) -> Proposal:
    """What followed the latest earlier place of the row's last 3 tokens, else of its last 2, else of its last."""
    B, S = rows.tokens_BS.shape
    place_S, found_B = jnp.arange(S), jnp.full(B, -1)
    for n in range(1, LONGEST_NGRAM + 1):  # a longer one, where there is one, takes the place of a shorter
        match_BS = jnp.ones((B, S), bool)
        for back in range(1, n + 1):
            last_B = jnp.take_along_axis(rows.tokens_BS, jnp.maximum(rows.length_B - back, 0)[:, None], axis=1)
            match_BS &= jnp.roll(rows.tokens_BS, back, axis=1) == last_B  # of the token `back` before place s
        match_BS &= (place_S >= n) & (place_S < rows.length_B[:, None]) & (rows.length_B[:, None] > n)
        found_B = jnp.where(match_BS.any(1), jnp.max(jnp.where(match_BS, place_S, -1), axis=1), found_B)
    count_B = jnp.where(found_B < 0, 0, jnp.minimum(count_B, rows.length_B - found_B))
    from_BG = jnp.clip(found_B[:, None] + jnp.arange(G), 0, S - 1)
    drafted_BG = jnp.take_along_axis(rows.tokens_BS, from_BG, axis=1)
    place_BG = jnp.where(jnp.arange(G) < count_B[:, None], rows.length_B[:, None] + jnp.arange(G), S)
    tokens_BS = rows.tokens_BS.at[jnp.arange(B)[:, None], place_BG].set(drafted_BG, mode="drop")
    vocabulary_V = jnp.arange(vocab_size)
    return Proposal(tokens_BS, count_B, jnp.where(drafted_BG[..., None] == vocabulary_V, 0.0, -jnp.inf))
