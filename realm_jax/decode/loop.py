"""The decoding loop on the device: a state, a prefill, one step, and the while_loop around it.

Called by `decode.generate`; speculative decoding and the engine work on the same state. All functions are pure and
ask nothing of the host.

Shapes: B rows, S tokens a row can hold, T tokens of a prefill chunk, V vocabulary, E end-of-generation ids, N top
log-probabilities.

The last token of a row is always *pending*: it stands in `tokens_BS` and has not been through the model. Prefill runs
a prompt up to its last token, and every step runs the pending token and appends the one drawn from its logits. So
there is no first-token case, and taking tokens back is arithmetic on `length_B` and `cache.length_B`.
"""

import functools
from collections.abc import Collection, Sequence
from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from realm_jax.decode import sampling, settings
from realm_jax.decode.sampling import SamplingParams
from realm_jax.decode.settings import Settings
from realm_jax.model.cache import KVCache
from realm_jax.model.config import Config
from realm_jax.model.params import Params
from realm_jax.model.transformer import run, unembed

_EOG_BUCKET = 8


class Stop(IntEnum):
    """Why a row does not go on; RUNNING if it does."""

    RUNNING = 0
    EOS = 1
    """The model drew an end-of-generation token, which is not kept."""
    LENGTH = 2
    """The row reached its `limit_B`."""
    STOP = 3
    """The host found a stop string, or cancelled the row."""
    FAILED = 4
    """The model's logits were not finite; the row ends before that token."""
    EMPTY = 5
    """Nobody sits here: a padding row."""


@struct.dataclass
class LogprobBuffers:
    """Log-probabilities of generated tokens under the model's own distribution, at the tokens' positions.

    Defined where `prompt_length_B <= position < length_B`, leftovers elsewhere.
    """

    chosen_BS: jax.Array
    """float32, of the token itself."""
    top_ids_BSN: jax.Array
    """int32, the most likely tokens, best first."""
    top_BSN: jax.Array
    """float32, of the most likely tokens."""


@struct.dataclass
class DecodeState:
    """Everything that changes while a batch of ragged rows is decoded, and what each row asked for.

    Invariants: `1 <= prompt_length_B <= length_B <= limit_B <= S` for a running row; `cache.length_B <= length_B - 1`,
    with equality once the row is prefilled (only then does `step` move it). A row that is not RUNNING keeps its
    tokens, lengths and log-probabilities: it takes part in each batched operation as padding.
    """

    tokens_BS: jax.Array
    """int32: the prompt, then generated tokens; leftovers from `length_B` on. End-of-generation tokens are not kept."""
    length_B: jax.Array
    """int32: tokens in each row, the pending one included."""
    prompt_length_B: jax.Array
    """int32: how many of them are the prompt."""
    limit_B: jax.Array
    """int32: the length at which the row ends: prompt plus token budget."""
    stop_B: jax.Array
    """int32: a `Stop`."""
    cache: KVCache
    """Keys and values of the tokens before the pending one; its size is S."""
    keys_B: jax.Array
    """Typed PRNG keys, one a row; the draw for position p uses `fold_in(key, p)`."""
    params: SamplingParams
    """The sampling rules of each row."""
    eog_E: jax.Array
    """int32: ids that end a row, padded with -1."""
    logprobs: LogprobBuffers | None = None
    """Log-probabilities, or None where no row asked for them."""
    dtype: str = struct.field(pytree_node=False, default="float32")
    """Static: of the activations between the products, as in `transformer.run`."""

    @property
    def ready_B(self) -> jax.Array:
        """bool: the row is running and prefilled, so a step will append a token."""
        return (self.stop_B == Stop.RUNNING) & (self.cache.length_B == self.length_B - 1)


def step(params: Params, config: Config, state: DecodeState, deltas: Params | None = None) -> DecodeState:
    """Run the pending token of every ready row and append the token drawn from its logits, or end the row.

    deltas: of an adapter that all rows share, or (leading axis B) of one a row; see `lora.stack.deltas_for`.
    """
    ready_B = state.ready_B
    pending_B1 = jnp.take_along_axis(state.tokens_BS, state.length_B[:, None] - 1, axis=1)
    count_B = ready_B.astype(jnp.int32)
    hidden_B1D, cache = run(params, config, pending_B1, state.cache, count_B, deltas=deltas, dtype=state.dtype)
    logits_BV = unembed(params, config, hidden_B1D[:, 0], deltas=deltas)
    past = sampling.past(state.params, state.tokens_BS, state.prompt_length_B, state.length_B, config.vocab_size)
    token_B = sampling.next_token(logits_BV, state.params, past, state.keys_B, state.length_B)
    return _append(state.replace(cache=cache), ready_B, token_B, logits_BV)


def _append(state: DecodeState, ready_B: jax.Array, token_B: jax.Array, logits_BV: jax.Array) -> DecodeState:
    """Write the drawn token of each ready row, unless it ends the row, and note why a row ends."""
    failed_B = ~sampling.has_distribution(logits_BV)
    eos_B = jnp.any(token_B[:, None] == state.eog_E, axis=-1)
    write_B = ready_B & ~failed_B & ~eos_B
    row_B = jnp.arange(token_B.shape[0])
    at = (row_B, jnp.where(write_B, state.length_B, state.tokens_BS.shape[1]))  # past the end: dropped
    length_B = state.length_B + write_B
    reason_B = jnp.where(length_B >= state.limit_B, Stop.LENGTH, Stop.RUNNING)
    reason_B = jnp.where(failed_B, Stop.FAILED, jnp.where(eos_B, Stop.EOS, reason_B))
    return state.replace(
        tokens_BS=state.tokens_BS.at[at].set(token_B, mode="drop"),
        length_B=length_B,
        stop_B=jnp.where(ready_B, reason_B, state.stop_B),
        logprobs=record(state.logprobs, at, token_B, logits_BV),
    )


def record(
    buffers: LogprobBuffers | None, at: tuple[jax.Array, jax.Array], token_B: jax.Array, logits_BV: jax.Array
) -> LogprobBuffers | None:
    """The buffers with the log-probabilities of one token a row at its place `at`."""
    if buffers is None:
        return None
    chosen_B, ids_BN, top_BN = sampling.token_logprobs(logits_BV, token_B, buffers.top_BSN.shape[-1])
    return LogprobBuffers(
        chosen_BS=buffers.chosen_BS.at[at].set(chosen_B, mode="drop"),
        top_ids_BSN=buffers.top_ids_BSN.at[at].set(ids_BN, mode="drop"),
        top_BSN=buffers.top_BSN.at[at].set(top_BN, mode="drop"),
    )


def prefill(
    params: Params, config: Config, state: DecodeState, chunk: int, deltas: Params | None = None
) -> DecodeState:
    """Take the next `chunk` (T, static) tokens of each running row into the cache, or as many as are left before the
    pending one. The cache's buffers are reused: the state passed in is gone afterwards.
    """
    left_B = jnp.where(state.stop_B == Stop.RUNNING, state.length_B - 1 - state.cache.length_B, 0)
    tokens_BS, dtype = state.tokens_BS, state.dtype
    return state.replace(cache=fill_cache(params, config, state.cache, tokens_BS, left_B, chunk, deltas, dtype=dtype))


@functools.partial(jax.jit, static_argnames=("config", "chunk", "dtype"), donate_argnames="cache")
def fill_cache(
    params: Params,
    config: Config,
    cache: KVCache,
    tokens_BS: jax.Array,
    left_B: jax.Array,
    chunk: int,
    deltas: Params | None,
    rows_B: jax.Array | None = None,
    dtype: str = "float32",
) -> KVCache:
    """Run up to `chunk` of each row's `left_B` next tokens. Knows nothing of sampling, whose variants thus share it.

    rows_B: which rows of the cache these are; dtype: of the activations; both as in `transformer.run`.
    """
    start_B = cache.length_B if rows_B is None else cache.length_B.at[rows_B].get(mode="clip")
    position_BT = start_B[:, None] + jnp.arange(chunk)
    tokens_BT = jnp.take_along_axis(tokens_BS, jnp.minimum(position_BT, tokens_BS.shape[1] - 1), axis=1)
    count_B = jnp.clip(left_B, 0, chunk)
    return run(params, config, tokens_BT, cache, count_B, rows_B=rows_B, deltas=deltas, dtype=dtype)[1]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(
    params: Params, config: Config, state: DecodeState, max_steps: int | jax.Array, deltas: Params | None = None
) -> DecodeState:
    """Step until no row is ready or `max_steps` steps are done, all on the device.

    max_steps is traced: stretches of any length share one executable. The state's buffers are reused: the one passed
    in is gone afterwards.
    """

    def goes_on(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        steps, state = carry
        return (steps < max_steps) & jnp.any(state.ready_B)

    def body(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        steps, state = carry
        return steps + 1, step(params, config, state, deltas)

    return jax.lax.while_loop(goes_on, body, (jnp.int32(0), state))[1]


def init_state(
    config: Config,
    prompts: Sequence[Sequence[int]],
    requests: Sequence[Settings],
    eog_ids: Collection[int] = (),
    *,
    rows: int | None = None,
    size: int,
    dtype: jnp.dtype | str = jnp.float32,
    mixed_bias: int | None = None,
    logprobs: int | None = None,
) -> DecodeState:
    """A batch that has not run yet: row b holds prompt b, with `requests[b]` checked and within the context.

    prompts: token ids, at least one each. rows: B, at least len(prompts); the rest are EMPTY. size: S, at least
    each prompt plus its budget. dtype: of the cache. mixed_bias: for rows that come and go, as in `settings.pack`.
    logprobs: how many top tokens to have room for, by default the most that a request asks for.
    """
    rows = rows or len(prompts)
    tokens_BS = np.zeros((rows, size), np.int32)
    length_B, limit_B, stop_B = np.ones(rows, np.int32), np.ones(rows, np.int32), np.full(rows, Stop.EMPTY, np.int32)
    for b, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        tokens_BS[b, : len(prompt)] = prompt
        length_B[b] = len(prompt)
        limit_B[b] = min(len(prompt) + request.max_new_tokens, config.context_length)
        stop_B[b] = Stop.RUNNING if limit_B[b] > length_B[b] else Stop.LENGTH
    eog_E = np.full(-(-max(len(eog_ids), 1) // _EOG_BUCKET) * _EOG_BUCKET, -1, np.int32)
    eog_E[: len(eog_ids)] = sorted(eog_ids)
    seeds = [request.seed for request in requests]
    top = max((request.logprobs for request in requests), default=0) if logprobs is None else logprobs
    return DecodeState(
        tokens_BS=jnp.array(tokens_BS),
        length_B=jnp.array(length_B),
        prompt_length_B=jnp.array(length_B),
        limit_B=jnp.array(limit_B),
        stop_B=jnp.array(stop_B),
        cache=KVCache.create(config, rows, size, dtype),
        keys_B=settings.row_keys(seeds + [0] * (rows - len(seeds))),
        params=settings.pack(requests, rows, config.vocab_size, mixed_bias=mixed_bias),
        eog_E=jnp.array(eog_E),
        logprobs=_logprob_buffers(rows, size, top),
    )


def _logprob_buffers(rows: int, size: int, top: int) -> LogprobBuffers | None:
    if top == 0:
        return None
    return LogprobBuffers(
        chosen_BS=jnp.zeros((rows, size), jnp.float32),
        top_ids_BSN=jnp.zeros((rows, size, top), jnp.int32),
        top_BSN=jnp.zeros((rows, size, top), jnp.float32),
    )
