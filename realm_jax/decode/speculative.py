"""Speculative decoding on the device: a draft proposes tokens, the target verifies them in one forward pass.

One round of the `lax.while_loop` lets the draft propose up to G tokens a row, runs the target over the pending token
and all of them at once, and keeps a run of them, plus one token of the target's own. What it keeps has exactly the
target's distribution, whatever the draft (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192; Chen et al. 2023,
https://arxiv.org/abs/2302.01318): a token x that the draft drew with probability q(x) is kept with probability
min(1, p(x) / q(x)); the first that is not is replaced by one drawn from the normalised positive part of p - q; where
all were kept, one more is drawn from p. Taking tokens back is arithmetic on lengths.

Called by `decode.batch`. The state is that of `decode.loop` and what a draft adds to it.

Shapes: B rows, S tokens a row can hold, V vocabulary, G draft tokens a round, J = G + 1 places that are verified.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from realm_jax.decode import loop, sampling
from realm_jax.decode.drafts import Draft, Proposal, propose
from realm_jax.decode.loop import DecodeState, Stop
from realm_jax.decode.speedup import best_length, expected_speedup
from realm_jax.model.cache import KVCache
from realm_jax.model.config import Config
from realm_jax.model.params import Params
from realm_jax.model.transformer import run, unembed

ACCEPT = 0x5BEC  # folded into a row's key for the uniform numbers of acceptance
MEMORY = 0.9
"""How much of the estimate of a row's acceptance each round keeps."""
FIRST_GUESS = 0.7
"""A row's acceptance before anything is known of it."""
PATIENCE = 8.0
"""Proposals that a row's estimate starts from, and that must be judged before it may end speculation."""
LOSS = 0.95
"""Speed over that of plain decoding, as expected from its acceptance, below which a row with a fixed length ends it."""


@struct.dataclass
class Tally:
    """What became of the proposals of each row; int32. Only rounds in which the row was running count.

    rounds_B: target forward passes. tokens_B: tokens that they gave. drafted_BG, reached_BG, accepted_BG: how often
    place j of a round was proposed; was judged, all before it having been accepted and the row going on; was accepted.
    histogram_BJ: rounds by how many proposals were accepted.
    """

    rounds_B: jax.Array
    tokens_B: jax.Array
    drafted_BG: jax.Array
    reached_BG: jax.Array
    accepted_BG: jax.Array
    histogram_BJ: jax.Array

    @classmethod
    def empty(cls, rows: int, draft_tokens: int) -> "Tally":
        """Nothing counted yet, for rounds of so many draft tokens."""
        by_row, by_place = (rows,), (rows, draft_tokens)
        shapes = (by_row, by_row, by_place, by_place, by_place, (rows, draft_tokens + 1))
        return cls(*(jnp.zeros(shape, jnp.int32) for shape in shapes))  # no two the same buffer: they are donated


@struct.dataclass
class SpeculativeState:
    """A batch being decoded speculatively.

    decode: as in plain decoding; a running row's cache is one short of its tokens. cache: the draft's, or None; for a
    row that still speculates it is one or two short. propose_B: int32, how many tokens the draft proposes next, 0 for a
    row that has given speculation up. accepted_B, judged_B: float32, fading sums that estimate a row's acceptance.
    """

    decode: DecodeState
    cache: KVCache | None
    propose_B: jax.Array
    accepted_B: jax.Array
    judged_B: jax.Array
    tally: Tally


def begin(state: DecodeState, draft: Draft) -> SpeculativeState:
    """The state before the first round and before the draft has read the prompts."""
    rows, size = state.tokens_BS.shape
    cache = None
    if draft.params is not None:
        cache = KVCache.create(draft.config, rows, size, state.cache.k.dtype)
    return SpeculativeState(
        decode=state,
        cache=cache,
        propose_B=jnp.full(rows, draft.tokens, jnp.int32),
        accepted_B=jnp.full(rows, FIRST_GUESS * PATIENCE, jnp.float32),
        judged_B=jnp.full(rows, PATIENCE, jnp.float32),
        tally=Tally.empty(rows, draft.tokens),
    )


def prefill_draft(draft: Draft, state: SpeculativeState, chunk: int) -> SpeculativeState:
    """Take the next `chunk` tokens of each prompt into the draft's cache; as `loop.prefill`."""
    if state.cache is None:
        return state
    rows = state.decode
    left_B = jnp.where(rows.stop_B == Stop.RUNNING, rows.length_B - 1 - state.cache.length_B, 0)
    cache = loop.fill_cache(draft.params, draft.config, state.cache, rows.tokens_BS, left_B, chunk, draft.deltas)
    return state.replace(cache=cache)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(
    params: Params,
    config: Config,
    draft: Draft,
    state: SpeculativeState,
    max_rounds: int | jax.Array,
    deltas: Params | None = None,
) -> SpeculativeState:
    """Rounds until no row is ready or `max_rounds` are done, all on the device; as `loop.decode`."""

    def goes_on(carry: tuple[jax.Array, SpeculativeState]) -> jax.Array:
        rounds, state = carry
        return (rounds < max_rounds) & jnp.any(state.decode.ready_B)

    def body(carry: tuple[jax.Array, SpeculativeState]) -> tuple[jax.Array, SpeculativeState]:
        rounds, state = carry
        speculates = jnp.any((state.propose_B > 0) & state.decode.ready_B)
        state = lax.cond(
            speculates,
            lambda s: speculative_round(params, config, draft, s, deltas),
            lambda s: _plain_round(params, config, s, deltas),
            state,
        )
        return rounds + 1, state

    return lax.while_loop(goes_on, body, (jnp.int32(0), state))[1]


def _plain_round(params: Params, config: Config, state: SpeculativeState, deltas: Params | None) -> SpeculativeState:
    """One step of plain decoding, for a batch in which no row speculates any more."""
    ready_B = state.decode.ready_B
    after = loop.step(params, config, state.decode, deltas)
    gained_B = after.length_B - state.decode.length_B
    tally = state.tally.replace(rounds_B=state.tally.rounds_B + ready_B, tokens_B=state.tally.tokens_B + gained_B)
    return state.replace(decode=after, tally=tally)


def speculative_round(
    params: Params, config: Config, draft: Draft, state: SpeculativeState, deltas: Params | None = None
) -> SpeculativeState:
    """Propose, verify, accept or reject, for every ready row."""
    rows = state.decode
    proposal, cache = propose(draft, config.vocab_size, rows, state.cache, state.propose_B)
    logits_BJV, rows = _verify(params, config, rows, proposal, draft.tokens, deltas)
    log_p_BJV = _target_distribution(rows, proposal.tokens_BS, logits_BJV)
    accepted_B, next_B = accept(rows, proposal, log_p_BJV)
    return _advance(draft, state, rows, proposal, cache, logits_BJV, accepted_B, next_B)


def _verify(
    params: Params, config: Config, rows: DecodeState, proposal: Proposal, G: int, deltas: Params | None
) -> tuple[jax.Array, DecodeState]:
    """The target's logits after the pending token and after each proposed one, (B, J, V), and its cache filled."""
    ready_B = rows.ready_B
    place_BJ = rows.length_B[:, None] - 1 + jnp.arange(G + 1)
    tokens_BJ = jnp.take_along_axis(proposal.tokens_BS, jnp.minimum(place_BJ, rows.tokens_BS.shape[1] - 1), axis=1)
    count_B = jnp.where(ready_B, G + 1, 0)
    hidden_BJD, cache = run(params, config, tokens_BJ, rows.cache, count_B, deltas=deltas)
    cache = cache.replace(length_B=rows.cache.length_B)  # how much of it counts is decided by `_advance`
    return unembed(params, config, hidden_BJD, deltas=deltas), rows.replace(cache=cache)


def _target_distribution(rows: DecodeState, tokens_BS: jax.Array, logits_BJV: jax.Array) -> jax.Array:
    """Log-probabilities (B, J, V) of the tokens that the target would draw at each place."""
    J, V = logits_BJV.shape[1:]

    def at(j: jax.Array, logits_BV: jax.Array) -> jax.Array:
        past = None
        if rows.params.penalize:
            past = sampling.history(tokens_BS, rows.prompt_length_B, rows.length_B + j, V)
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


def _advance(
    draft: Draft,
    state: SpeculativeState,
    rows: DecodeState,
    proposal: Proposal,
    cache: KVCache | None,
    logits_BJV: jax.Array,
    accepted_B: jax.Array,
    next_B: jax.Array,
) -> SpeculativeState:
    """The state after a round: what is kept is written, rows end where they must, caches are cut to what counts."""
    G, ready_B, row_B = draft.tokens, rows.ready_B, jnp.arange(next_B.shape[0])
    J_J = jnp.arange(G + 1)
    # y: the tokens of the round, proposals and then the target's own; what stands behind that does not count.
    at = (row_B, jnp.where(ready_B, rows.length_B + accepted_B, rows.tokens_BS.shape[1]))
    tokens_BS = proposal.tokens_BS.at[at].set(next_B, mode="drop")
    tokens_BS = jnp.where(ready_B[:, None], tokens_BS, rows.tokens_BS)
    place_BJ = jnp.minimum(rows.length_B[:, None] + J_J, tokens_BS.shape[1] - 1)
    y_BJ = jnp.take_along_axis(tokens_BS, place_BJ, axis=1)
    failed_BJ = ~jnp.isfinite(jnp.max(logits_BJV, axis=-1))
    eos_BJ = jnp.any(y_BJ[..., None] == rows.eog_E, axis=-1)
    ends_BJ = (failed_BJ | eos_BJ) & (accepted_B[:, None] >= J_J)
    end_B = jnp.where(ends_BJ.any(1), jnp.argmax(ends_BJ, axis=1), G + 1)
    room_B = rows.limit_B - rows.length_B
    kept_B = jnp.where(ready_B, jnp.minimum(jnp.minimum(accepted_B + 1, end_B), room_B), 0)
    length_B = rows.length_B + kept_B
    ended_B = (end_B <= accepted_B) & (end_B < room_B)
    failed_B = jnp.take_along_axis(failed_BJ, jnp.minimum(end_B, G)[:, None], axis=1)[:, 0]
    reason_B = jnp.where(length_B >= rows.limit_B, Stop.LENGTH, Stop.RUNNING)
    reason_B = jnp.where(ended_B, jnp.where(failed_B, Stop.FAILED, Stop.EOS), reason_B)
    logprobs = rows.logprobs
    for j in range(G + 1) if logprobs is not None else ():
        at = (row_B, jnp.where(j < kept_B, rows.length_B + j, tokens_BS.shape[1]))
        logprobs = loop.record(logprobs, at, y_BJ[:, j], logits_BJV[:, j])
    after = rows.replace(
        tokens_BS=tokens_BS,
        length_B=length_B,
        stop_B=jnp.where(ready_B, reason_B, rows.stop_B),
        cache=rows.cache.replace(length_B=jnp.where(ready_B, length_B - 1, rows.cache.length_B)),
        logprobs=logprobs,
    )
    if cache is not None:
        cache = cache.replace(length_B=jnp.where(ready_B, jnp.minimum(cache.length_B, length_B - 1), cache.length_B))
    judged_BG = (J_J[:G] < proposal.count_B[:, None]) & (J_J[:G] <= accepted_B[:, None])
    judged_BG &= (J_J[:G] < room_B[:, None]) & (J_J[:G] <= end_B[:, None]) & ready_B[:, None]
    taken_BG = judged_BG & (J_J[:G] < accepted_B[:, None])
    tally = _count(state.tally, proposal.count_B, judged_BG, taken_BG, kept_B, ready_B)
    return _adapt(draft, state.replace(decode=after, cache=cache, tally=tally), judged_BG, taken_BG)


def _count(
    tally: Tally,
    count_B: jax.Array,
    judged_BG: jax.Array,
    taken_BG: jax.Array,
    kept_B: jax.Array,
    ready_B: jax.Array,
) -> Tally:
    G = judged_BG.shape[1]
    drafted_BG = (jnp.arange(G) < count_B[:, None]) & ready_B[:, None]
    accepted_BJ = (taken_BG.sum(1)[:, None] == jnp.arange(G + 1)) & ready_B[:, None]
    return Tally(
        rounds_B=tally.rounds_B + ready_B,
        tokens_B=tally.tokens_B + kept_B,
        drafted_BG=tally.drafted_BG + drafted_BG,
        reached_BG=tally.reached_BG + judged_BG,
        accepted_BG=tally.accepted_BG + taken_BG,
        histogram_BJ=tally.histogram_BJ + accepted_BJ,
    )


def _adapt(draft: Draft, state: SpeculativeState, judged_BG: jax.Array, taken_BG: jax.Array) -> SpeculativeState:
    """How many tokens to propose next.

    Adaptive: as many as the row's acceptance makes worth their cost, from a fading estimate. Fixed: all. Either way
    none any more once the acceptance seen says that speculation loses: a draft that fell behind does not catch up.
    """
    keep_B = jnp.where(judged_BG.any(1), MEMORY, 1.0)
    accepted_B = keep_B * state.accepted_B + taken_BG.sum(1)
    judged_B = keep_B * state.judged_B + judged_BG.sum(1)
    seen_B = state.tally.reached_BG.sum(1)
    if draft.adaptive:
        best_B = best_length(accepted_B / judged_B, draft.cost, draft.tokens)
        propose_B = jnp.where(seen_B >= PATIENCE, best_B, jnp.maximum(best_B, 1))
    else:
        acceptance_B = state.tally.accepted_BG.sum(1) / jnp.maximum(seen_B, 1)
        loses_B = expected_speedup(acceptance_B, draft.tokens, draft.cost) < LOSS
        propose_B = jnp.where(loses_B & (seen_B >= 4 * PATIENCE), 0, draft.tokens)
    propose_B = jnp.where(state.propose_B == 0, 0, propose_B)
    return state.replace(accepted_B=accepted_B, judged_B=judged_B, propose_B=propose_B)
