"""Speculative decoding on the device: a draft proposes tokens, the target verifies them in one forward pass.

One round of the `lax.while_loop` lets the draft propose up to G tokens a row, runs the target over the pending token
and all of them at once, and keeps a run of them, plus one token of the target's own. What it keeps has exactly the
target's distribution, whatever the draft (`decode.acceptance`). Taking tokens back is arithmetic on lengths. Once no
row speculates any more, a second loop decodes plainly.

Called by `decode.batch`. The state is that of `decode.loop` and what a draft adds to it.

Shapes: B rows, S tokens a row can hold, V vocabulary, G draft tokens a round, J = G + 1 places that are verified.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from realm_jax.decode import loop, sampling
from realm_jax.decode.acceptance import accept, target_distribution
from realm_jax.decode.drafts import Draft, Proposal, propose
from realm_jax.decode.loop import DecodeState, Stop
from realm_jax.decode.tally import FIRST_GUESS, PATIENCE, Tally, estimate, next_length
from realm_jax.model.cache import KVCache
from realm_jax.model.config import Config
from realm_jax.model.params import Params
from realm_jax.model.transformer import run, unembed


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

    Carry = tuple[jax.Array, SpeculativeState]

    def goes_on(carry: Carry) -> jax.Array:
        rounds, state = carry
        return (rounds < max_rounds) & jnp.any(state.decode.ready_B)

    def speculates(carry: Carry) -> jax.Array:
        return goes_on(carry) & jnp.any((carry[1].propose_B > 0) & carry[1].decode.ready_B)

    def ahead(carry: Carry) -> Carry:
        return carry[0] + 1, speculative_round(params, config, draft, carry[1], deltas)

    def plain(carry: Carry) -> Carry:
        rounds, state = carry
        rows, tally = loop.step(params, config, state.decode, deltas), state.tally.add_plain(state.decode.ready_B)
        return rounds + 1, state.replace(decode=rows, tally=tally)

    # Who gives speculation up does not take it up again. A `cond` in one loop would copy the caches every round.
    carry = lax.while_loop(speculates, ahead, (jnp.int32(0), state))
    return lax.while_loop(goes_on, plain, carry)[1]


def speculative_round(
    params: Params, config: Config, draft: Draft, state: SpeculativeState, deltas: Params | None = None
) -> SpeculativeState:
    """Propose, verify, accept or reject, for every ready row."""
    rows = state.decode
    proposal, cache = propose(draft, config.vocab_size, rows, state.cache, state.propose_B)
    logits_BJV, rows = _verify(params, config, rows, proposal, draft.tokens, deltas)
    log_p_BJV = target_distribution(rows, proposal.tokens_BS, logits_BJV)
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
    hidden_BJD, cache = run(params, config, tokens_BJ, rows.cache, count_B, deltas=deltas, dtype=rows.dtype)
    cache = cache.replace(length_B=rows.cache.length_B)  # how much of it counts is decided by `_advance`
    return unembed(params, config, hidden_BJD, deltas=deltas), rows.replace(cache=cache)


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
    J_J, G, ready_B = jnp.arange(draft.tokens + 1), draft.tokens, rows.ready_B
    tokens_BS, y_BJ = _write(rows, proposal, accepted_B, next_B)
    end_B, reason_B = _ends(rows, y_BJ, logits_BJV, accepted_B)
    # The target's own token comes after those accepted, and propose leaves it room: no row passes its limit here.
    kept_B = jnp.where(ready_B, jnp.minimum(accepted_B + 1, end_B), 0)
    length_B = rows.length_B + kept_B
    full_B = (reason_B == Stop.RUNNING) & (length_B >= rows.limit_B)
    place_BJ = jnp.where(kept_B[:, None] > J_J, rows.length_B[:, None] + J_J, tokens_BS.shape[1])
    at = (jnp.repeat(jnp.arange(len(kept_B)), G + 1), place_BJ.ravel())
    logprobs = loop.record(rows.logprobs, at, y_BJ.ravel(), logits_BJV.reshape(-1, logits_BJV.shape[-1]))
    after = rows.replace(
        tokens_BS=tokens_BS,
        length_B=length_B,
        stop_B=jnp.where(ready_B, jnp.where(full_B, Stop.LENGTH, reason_B), rows.stop_B),
        cache=rows.cache.replace(length_B=jnp.where(ready_B, length_B - 1, rows.cache.length_B)),
        logprobs=logprobs,
    )
    if cache is not None:
        cache = cache.replace(length_B=jnp.where(ready_B, jnp.minimum(cache.length_B, length_B - 1), cache.length_B))
    drafted_BG = (J_J[:G] < proposal.count_B[:, None]) & ready_B[:, None]
    judged_BG = drafted_BG & (J_J[:G] <= jnp.minimum(accepted_B, end_B)[:, None])
    taken_BG = judged_BG & (J_J[:G] < accepted_B[:, None])
    tally = state.tally.add(drafted_BG, judged_BG, taken_BG, kept_B + (ready_B & (end_B <= accepted_B)), ready_B)
    sums_B = estimate(state.accepted_B, state.judged_B, judged_BG, taken_BG)
    propose_B = next_length(draft, tally, sums_B[0] / sums_B[1], state.propose_B)
    return SpeculativeState(after, cache, propose_B, *sums_B, tally)


def _write(
    rows: DecodeState, proposal: Proposal, accepted_B: jax.Array, next_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The rows with the target's own token behind those accepted, (B, S), and the tokens of the round, (B, J).

    What stands behind the target's own token does not count.
    """
    B, S = rows.tokens_BS.shape
    at = (jnp.arange(B), jnp.where(rows.ready_B, rows.length_B + accepted_B, S))
    tokens_BS = proposal.tokens_BS.at[at].set(next_B, mode="drop")
    place_BJ = rows.length_B[:, None] + jnp.arange(proposal.log_q_BGV.shape[1] + 1)
    return tokens_BS, jnp.take_along_axis(tokens_BS, jnp.minimum(place_BJ, S - 1), axis=1)


def _ends(
    rows: DecodeState, y_BJ: jax.Array, logits_BJV: jax.Array, accepted_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """At which token of the round each row ends before it (B,), J where at none; and why (B,), a `Stop`."""
    J = y_BJ.shape[1]
    failed_BJ = ~sampling.has_distribution(logits_BJV)
    eos_BJ = jnp.any(y_BJ[..., None] == rows.eog_E, axis=-1)
    ends_BJ = (failed_BJ | eos_BJ) & (jnp.arange(J) <= accepted_B[:, None])
    end_B = jnp.where(ends_BJ.any(1), jnp.argmax(ends_BJ, axis=1), J)
    failed_B = jnp.take_along_axis(failed_BJ, jnp.minimum(end_B, J - 1)[:, None], axis=1)[:, 0]
    reason_B = jnp.where(failed_B, Stop.FAILED, Stop.EOS)
    return end_B, jnp.where(end_B < J, reason_B, Stop.RUNNING)
