"""The rule of speculative decoding: which proposals are kept, and what the target adds. Called by `decode.speculative`.

What is kept has exactly the target's distribution, whatever the draft (Leviathan et al. 2023,
https://arxiv.org/abs/2211.17192; Chen et al. 2023, https://arxiv.org/abs/2302.01318): a token x that the draft drew
with probability q(x) is kept with probability min(1, p(x) / q(x)); the first that is not is replaced by one drawn from
the normalised positive part of p - q; where all were kept, one more is drawn from p.

Shapes: B rows, S tokens a row can hold, V vocabulary, G draft tokens a round, J = G + 1 places that are verified.
"""

import jax
import jax.numpy as jnp

from realm_jax.decode import sampling
from realm_jax.decode.drafts import Proposal
from realm_jax.decode.loop import DecodeState

ACCEPT = 0x5BEC  # folded into a row's key for the uniform numbers of acceptance


def target_distribution(rows: DecodeState, tokens_BS: jax.Array, logits_BJV: jax.Array) -> jax.Array:
    """Log-probabilities (B, J, V) of the tokens that the target would draw at each place."""
    J, V = logits_BJV.shape[1:]

    def at(j: jax.Array, logits_BV: jax.Array) -> jax.Array:
        past = sampling.past(rows.params, tokens_BS, rows.prompt_length_B, rows.length_B + j, V)
        return sampling.log_distribution(logits_BV, rows.params, past)

    return jax.vmap(at, (0, 1), 1)(jnp.arange(J), logits_BJV)


def accept(rows: DecodeState, proposal: Proposal, log_p_BJV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many proposals of each row are kept (B,), and the token that the target adds to them (B,).

    The rule of the module's docstring; its random numbers depend on the row's key and the place alone.
    """
    G = proposal.log_q_BGV.shape[1]
    place_BG = rows.length_B[:, None] + jnp.arange(G)
    drafted_BG = proposal.drafted(rows.length_B)
    p_BG, q_BG = (
        jnp.exp(jnp.take_along_axis(x[:, :G], drafted_BG[..., None], axis=2)[..., 0])
        for x in (log_p_BJV, proposal.log_q_BGV)
    )

    def uniform(key: jax.Array, place: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, ACCEPT), place))

    u_BG = jax.vmap(jax.vmap(uniform, (None, 0)))(rows.keys_B, place_BG)
    kept_BG = (u_BG * q_BG < p_BG) & (jnp.arange(G) < proposal.count_B[:, None])
    accepted_B = jnp.cumprod(kept_BG.astype(jnp.int32), axis=1).sum(1)
    log_p_BV = jnp.take_along_axis(log_p_BJV, accepted_B[:, None, None], axis=1)[:, 0]
    at_B = jnp.minimum(accepted_B, G - 1)[:, None, None]
    log_q_BV = jnp.take_along_axis(proposal.log_q_BGV, at_B, axis=1)[:, 0]
    rejected_B = accepted_B < proposal.count_B
    log_next_BV = jnp.where(rejected_B[:, None], residual(log_p_BV, log_q_BV), log_p_BV)
    if not rows.params.sample:
        return accepted_B, jnp.argmax(log_next_BV, axis=-1).astype(jnp.int32)
    return accepted_B, sampling.draw(log_next_BV, rows.keys_B, rows.length_B + accepted_B)


def residual(log_p_BV: jax.Array, log_q_BV: jax.Array) -> jax.Array:
    """Log of the normalised positive part of p - q; p itself where rounding has left nothing of it."""
    rest_BV = jnp.maximum(jnp.exp(log_p_BV) - jnp.exp(log_q_BV), 0.0)
    total_B1 = jnp.sum(rest_BV, axis=-1, keepdims=True)
    return jnp.where(total_B1 > 0, jnp.log(rest_BV) - jnp.log(total_B1), log_p_BV)
