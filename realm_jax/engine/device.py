"""What the engine does on the device: a fixed set of slots, and the few compiled functions that change them.

Called by `engine.engine` alone. Every function has static shapes only: which rows are admitted, prefilled, decoded or
ended, with which adapter, draft or sampling rule, are values. The buffers of the state that is passed in are reused.

Shapes: B slots, S places of a slot, P rows of a prefill chunk, T its tokens, N tokens that a call can append, K top
log-probabilities, G draft tokens a round.
"""

import functools
from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import struct

from realm_jax.decode import loop, speculative
from realm_jax.decode.drafts import Draft
from realm_jax.decode.loop import DecodeState, Stop
from realm_jax.decode.sampling import SamplingParams
from realm_jax.decode.speculative import SpeculativeState
from realm_jax.decode.tally import FIRST_GUESS, PATIENCE, Tally
from realm_jax.lora import Adapter
from realm_jax.lora.stack import select
from realm_jax.model.cache import UNBROKEN, KVCache
from realm_jax.model.config import Config
from realm_jax.model.params import Params


@struct.dataclass
class Slots:
    """All slots. state: of decoding, speculative if the engine has a draft. adapter_B: int32, entries of the stack."""

    state: DecodeState | SpeculativeState
    adapter_B: jax.Array

    @property
    def rows(self) -> DecodeState:
        """The decoding state, without what speculation adds."""
        return self.state.decode if isinstance(self.state, SpeculativeState) else self.state

    @property
    def draft_cache(self) -> KVCache | None:
        return self.state.cache if isinstance(self.state, SpeculativeState) else None

    def with_rows(self, rows: DecodeState, draft_cache: KVCache | None = None) -> "Slots":
        """With another decoding state; draft_cache: of the draft, None to keep it."""
        if not isinstance(self.state, SpeculativeState):
            return self.replace(state=rows)
        return self.replace(state=self.state.replace(decode=rows, cache=draft_cache or self.state.cache))


@struct.dataclass
class Admission:
    """New rows, at the places of their slots; where `mask_B` is not set, anything. Arrays as in `DecodeState`.

    propose_B: int32, draft tokens a round, 0 for a row that does not speculate.
    """

    mask_B: jax.Array
    tokens_BS: jax.Array
    length_B: jax.Array
    limit_B: jax.Array
    keys_B: jax.Array
    params: SamplingParams
    adapter_B: jax.Array
    propose_B: jax.Array


@struct.dataclass
class Report:
    """What a call of `decode` has done. tokens_BN: int32, the tokens appended. length_B, stop_B: as they are now.

    chosen_BN, top_ids_BNK, top_BNK: their log-probabilities, None where the engine keeps none. tally, propose_B: what
    speculation has come to, None without.
    """

    tokens_BN: jax.Array
    length_B: jax.Array
    stop_B: jax.Array
    chosen_BN: jax.Array | None
    top_ids_BNK: jax.Array | None
    top_BNK: jax.Array | None
    tally: Tally | None
    propose_B: jax.Array | None


@struct.dataclass
class Prefixes:
    """Rows of keys and values that prompts may start from: of the model, and of the draft or None."""

    cache: KVCache
    draft_cache: KVCache | None


def create(
    config: Config,
    draft: Draft | None,
    *,
    slots: int,
    size: int,
    dtype: str,
    eog_ids: Collection[int],
    bias: int,
    logprobs: int,
) -> Slots:
    """Empty slots. bias, logprobs: entries of a bias, and top log-probabilities, that a request may have."""
    state = loop.init_state(
        config, [], [], eog_ids, rows=slots, size=size, dtype=dtype, mixed_bias=bias, logprobs=logprobs
    )
    return Slots(state if draft is None else speculative.begin(state, draft), jnp.zeros(slots, jnp.int32))


def create_prefixes(config: Config, draft: Draft | None, rows: int, size: int, dtype: str) -> Prefixes:
    """Room for so many prefixes."""
    draft_config = None if draft is None else draft.config
    return Prefixes(
        KVCache.create(config, rows, size, dtype),
        None if draft_config is None else KVCache.create(draft_config, rows, size, dtype),
    )


@functools.partial(jax.jit, donate_argnames="slots")
def admit(slots: Slots, new: Admission) -> Slots:
    """The slots with new rows in them, which nothing has been computed of yet."""
    mask_B, rows = new.mask_B, slots.rows

    def pick(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(mask_B.reshape(-1, *[1] * (y.ndim - 1)), x, y)

    rows = rows.replace(
        tokens_BS=pick(new.tokens_BS, rows.tokens_BS),
        length_B=pick(new.length_B, rows.length_B),
        prompt_length_B=pick(new.length_B, rows.prompt_length_B),
        limit_B=pick(new.limit_B, rows.limit_B),
        stop_B=pick(jnp.int32(Stop.RUNNING), rows.stop_B),
        cache=rows.cache.replace(length_B=pick(jnp.int32(0), rows.cache.length_B)),
        keys_B=pick(new.keys_B, rows.keys_B),
        params=new.params.where(mask_B, rows.params),
    )
    state = rows
    if isinstance(slots.state, SpeculativeState):
        ahead = slots.state
        state = SpeculativeState(
            decode=rows,
            cache=ahead.cache and ahead.cache.replace(length_B=pick(jnp.int32(0), ahead.cache.length_B)),
            propose_B=pick(new.propose_B, ahead.propose_B),
            accepted_B=pick(jnp.float32(FIRST_GUESS * PATIENCE), ahead.accepted_B),
            judged_B=pick(jnp.float32(PATIENCE), ahead.judged_B),
            tally=jax.tree.map(lambda x: pick(jnp.int32(0), x), ahead.tally),
        )
    return Slots(state, pick(new.adapter_B, slots.adapter_B))


@functools.partial(jax.jit, static_argnames=("config", "chunk"), donate_argnames="slots")
def prefill(
    params: Params,
    config: Config,
    draft: Draft | None,
    slots: Slots,
    stack: Adapter | None,
    slot_P: jax.Array,
    chunk: int,
) -> Slots:
    """Take the next `chunk` (T) tokens of the prompts in some slots into the caches, or as many as are left.

    slot_P: int32, no two the same; B and more for padding.
    """
    rows = slots.rows
    deltas = None if stack is None else select(stack, slots.adapter_B.at[slot_P].get(mode="clip"))
    cache = _fill(params, config, rows, rows.cache, slot_P, chunk, deltas)
    draft_cache = slots.draft_cache
    if draft_cache is not None:
        draft_cache = _fill(draft.params, draft.config, rows, draft_cache, slot_P, chunk, draft.deltas)
    return slots.with_rows(rows.replace(cache=cache), draft_cache)


def _fill(
    params: Params,
    config: Config,
    rows: DecodeState,
    cache: KVCache,
    slot_P: jax.Array,
    chunk: int,
    deltas: Params | None,
) -> KVCache:
    def own(x: jax.Array, otherwise: int) -> jax.Array:
        return x.at[slot_P].get(mode="fill", fill_value=otherwise)

    running_P = own(rows.stop_B, Stop.EMPTY) == Stop.RUNNING
    left_P = jnp.where(running_P, own(rows.length_B, 0) - 1 - own(cache.length_B, 0), 0)
    return loop.fill_cache(
        params, config, cache, rows.tokens_BS.at[slot_P].get(mode="clip"), left_P, chunk, deltas, slot_P
    )


@functools.partial(jax.jit, static_argnames=("config", "steps", "window"), donate_argnames="slots")
def decode(
    params: Params,
    config: Config,
    draft: Draft | None,
    slots: Slots,
    stack: Adapter | None,
    end_B: jax.Array,
    steps: int,
    window: int,
) -> tuple[Slots, Report]:
    """Up to `steps` steps (or rounds) of every slot that is ready, after ending those in `end_B` (bool).

    window: no row gets longer; attention reads no further.
    """
    rows = slots.rows
    rows = rows.replace(stop_B=jnp.where(end_B & (rows.stop_B == Stop.RUNNING), Stop.STOP, rows.stop_B))
    start_B, deltas = rows.length_B, None if stack is None else select(stack, slots.adapter_B)
    narrow = _windowed(slots.with_rows(rows), window)
    if draft is None:
        state = loop.decode(params, config, narrow.state, steps, deltas)
    else:
        state = speculative.decode(params, config, draft, narrow.state, steps, deltas)
    slots = _windowed(slots.replace(state=state), None)
    return slots, _report(slots, start_B, steps * (1 if draft is None else draft.tokens + 1))


def _windowed(slots: Slots, window: int | None) -> Slots:
    draft_cache = slots.draft_cache and slots.draft_cache.replace(window=window)
    return slots.with_rows(slots.rows.replace(cache=slots.rows.cache.replace(window=window)), draft_cache)


def _report(slots: Slots, start_B: jax.Array, most: int) -> Report:
    """most: N."""
    rows = slots.rows
    place_BN = jnp.minimum(start_B[:, None] + jnp.arange(most), rows.tokens_BS.shape[1] - 1)
    row_B1 = jnp.arange(place_BN.shape[0])[:, None]
    ahead = slots.state if isinstance(slots.state, SpeculativeState) else None
    logprobs = rows.logprobs and jax.tree.map(lambda x: x[row_B1, place_BN], rows.logprobs)
    return Report(
        tokens_BN=rows.tokens_BS[row_B1, place_BN],
        # A copy: what is reported outlives the state, whose buffers the next call takes.
        length_B=rows.length_B + 0,
        stop_B=rows.stop_B + 0,
        chosen_BN=logprobs and logprobs.chosen_BS,
        top_ids_BNK=logprobs and logprobs.top_ids_BSN,
        top_BNK=logprobs and logprobs.top_BSN,
        tally=ahead and jax.tree.map(lambda x: x + 0, ahead.tally),
        propose_B=ahead and ahead.propose_B + 0,
    )


@functools.partial(jax.jit, donate_argnames="slots")
def start_from(slots: Slots, prefixes: Prefixes, slot: jax.Array, row: jax.Array, tokens: jax.Array) -> Slots:
    """The slots with the first `tokens` tokens of a slot's prompt taken from a row of the prefixes (all int32)."""
    rows, draft_cache = slots.rows, slots.draft_cache
    cache = _copy_row(rows.cache, prefixes.cache, slot, row, tokens)
    draft_cache = draft_cache and _copy_row(draft_cache, prefixes.draft_cache, slot, row, tokens)
    return slots.with_rows(rows.replace(cache=cache), draft_cache)


@functools.partial(jax.jit, donate_argnames="prefixes")
def keep(prefixes: Prefixes, slots: Slots, row: jax.Array, slot: jax.Array, tokens: jax.Array) -> Prefixes:
    """The prefixes with the first `tokens` tokens of a slot in a row."""
    draft_cache = prefixes.draft_cache
    return Prefixes(
        _copy_row(prefixes.cache, slots.rows.cache, row, slot, tokens),
        draft_cache and _copy_row(draft_cache, slots.draft_cache, row, slot, tokens),
    )


def _copy_row(to: KVCache, of: KVCache, into: jax.Array, row: jax.Array, tokens: jax.Array) -> KVCache:
    """A cache with a row of another one, of which so many tokens count."""

    def copied(x: jax.Array | None, y: jax.Array | None) -> jax.Array | None:
        return None if x is None else x.at[:, into].set(y[:, row])

    broken = of.broken_B[row]
    return to.replace(
        k=copied(to.k, of.k),
        v=copied(to.v, of.v),
        k_scale=copied(to.k_scale, of.k_scale),
        v_scale=copied(to.v_scale, of.v_scale),
        length_B=to.length_B.at[into].set(tokens),
        broken_B=to.broken_B.at[into].set(jnp.where(broken < tokens, broken, UNBROKEN)),
    )
