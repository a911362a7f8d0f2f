"""Sampling on the device: from a row's logits to the distribution its next token is drawn from, and the draw.

Called by `decode.loop` once a token, and meant for speculative decoding, which needs the true log-probabilities of
the sampling distribution. Everything here is pure, works on each row by itself, and traces without a host decision.

Shapes: B rows, V vocabulary, S token buffer, E bias entries, N top tokens reported.

The order of the rules is that of llama.cpp's default chain, so that a GGUF model sampled there and here with the
same numbers is asked for the same distribution (vLLM and Hugging Face apply the temperature before truncating):

1. logit bias, added;
2. penalties: repetition (Keskar et al. 2019, CTRL, arXiv:1909.05858) over prompt and generated tokens, then
   frequency and presence over generated tokens, as the OpenAI API defines them;
3. top-k: the k most likely tokens;
4. top-p (Holtzman et al. 2020, arXiv:1904.09751): of what is left, renormalised, the fewest most likely tokens
   whose probability adds up to at least p;
5. min-p (Nguyen et al. 2024, arXiv:2407.01082): tokens at least min_p times as likely as the most likely one;
6. temperature, on what is left. Temperature 0 is greedy: all probability on the largest logit after rules 1 and 2
   (the lowest id of equals).

Top-k, top-p and min-p each keep at least one token. Tokens with exactly equal logits stand or fall together, so a
tie at the edge keeps them all and the set kept does not depend on the order of ids.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

Result = TypeVar("Result")

_ORDER_BITS = 32


@struct.dataclass
class SamplingParams:
    """The sampling rules of a batch, one number a row; built from host settings by `decode.settings.pack`.

    All arrays are (B,) and float32 unless said otherwise. The three static switches say which code is compiled; a
    row that does not need a rule carries its neutral value, and a rule that no row needs is not compiled at all.
    """

    temperature: jax.Array
    """0 is greedy."""
    top_k: jax.Array
    """int32; 0 is off."""
    top_p: jax.Array
    """1 is off."""
    min_p: jax.Array
    """0 is off."""
    repetition_penalty: jax.Array
    """1 is off."""
    presence_penalty: jax.Array
    """0 is off."""
    frequency_penalty: jax.Array
    """0 is off."""
    bias_ids: jax.Array
    """(B, E) int32 token ids, each at most once a row; ids of V or more are padding. E = 0: no row has a bias."""
    bias_values: jax.Array
    """(B, E) added to the logits of `bias_ids`; -inf bans the token."""
    penalize: bool = struct.field(pytree_node=False, default=True)
    """Some row has a penalty."""
    sample: bool = struct.field(pytree_node=False, default=True)
    """Some row has a temperature above 0; otherwise every draw is an argmax."""
    truncate: bool = struct.field(pytree_node=False, default=True)
    """Some sampled row has top-k or top-p (min-p costs nothing and is always applied to sampled rows)."""
    mixed: bool = struct.field(pytree_node=False, default=False)
    """Rows come and go while the program stays: whether any row needs a rule is asked on the device, each time."""

    @property
    def penalized_B(self) -> jax.Array:
        """bool: the row has a penalty."""
        return (self.repetition_penalty != 1) | (self.presence_penalty != 0) | (self.frequency_penalty != 0)

    def where(self, mask_B: jax.Array, other: "SamplingParams") -> "SamplingParams":
        """The parameters of these rows where the mask is set, else those of the other's."""
        return jax.tree.map(lambda x, y: jnp.where(mask_B if x.ndim == 1 else mask_B[:, None], x, y), self, other)


@struct.dataclass
class History:
    """What the penalties know of a row's past."""

    seen_BV: jax.Array
    """bool: the token stands in the prompt or was generated."""
    generated_BV: jax.Array
    """int32: how often the token was generated."""


def history(tokens_BS: jax.Array, prompt_length_B: jax.Array, length_B: jax.Array, vocab_size: int) -> History:
    """Count each row's tokens before `length_B`; those from `prompt_length_B` on are the generated ones."""
    rows_B1 = jnp.arange(tokens_BS.shape[0])[:, None]
    position_S = jnp.arange(tokens_BS.shape[1])
    valid_BS = position_S < length_B[:, None]
    generated_BS = valid_BS & (position_S >= prompt_length_B[:, None])
    seen_BV = jnp.zeros((tokens_BS.shape[0], vocab_size), bool).at[rows_B1, tokens_BS].max(valid_BS, mode="drop")
    count_BV = (
        jnp.zeros(seen_BV.shape, jnp.int32).at[rows_B1, tokens_BS].add(generated_BS.astype(jnp.int32), mode="drop")
    )
    return History(seen_BV, count_BV)


def past(
    params: SamplingParams, tokens_BS: jax.Array, prompt_length_B: jax.Array, length_B: jax.Array, vocab_size: int
) -> History | None:
    """The `history` of rows, as far as their rules ask for it: None where no row has a penalty."""
    if not params.penalize:
        return None
    shape = (tokens_BS.shape[0], vocab_size)
    return _if_any(
        params,
        params.penalized_B,
        lambda: history(tokens_BS, prompt_length_B, length_B, vocab_size),
        lambda: History(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)),
    )


def _if_any(
    params: SamplingParams, needs_B: jax.Array, do: Callable[[], Result], otherwise: Callable[[], Result]
) -> Result:
    """`do()`; of mixed rows `otherwise()` while none of them needs it."""
    return lax.cond(jnp.any(needs_B), do, otherwise) if params.mixed else do()


def adjust(logits_BV: jax.Array, params: SamplingParams, past: History | None) -> jax.Array:
    """Apply logit bias and penalties (rules 1 and 2); `past` may be None where `params.penalize` is False."""
    if params.bias_ids.shape[1]:
        rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
        logits_BV = logits_BV.at[rows_B1, params.bias_ids].add(params.bias_values, mode="drop")
    if not params.penalize:
        return logits_BV
    repetition_B1 = params.repetition_penalty[:, None]
    damped_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(past.seen_BV, damped_BV, logits_BV)
    frequency_BV = params.frequency_penalty[:, None] * past.generated_BV
    return logits_BV - frequency_BV - params.presence_penalty[:, None] * (past.generated_BV > 0)


def log_distribution(logits_BV: jax.Array, params: SamplingParams, past: History | None = None) -> jax.Array:
    """The log-probabilities (B, V) float32 of the distribution that rules 1 to 6 define; -inf where a token is out.

    Greedy rows are 0 at their one token. `logits_BV` is the model's output, float32. A row of logits that holds a
    NaN or +inf, or nothing but -inf, has no distribution: its result is meaningless (`decode.loop` ends such a row).
    """
    logits_BV = adjust(logits_BV, params, past)
    vocabulary_V = jnp.arange(logits_BV.shape[1])
    greedy_BV = jnp.where(vocabulary_V == jnp.argmax(logits_BV, axis=-1, keepdims=True), 0.0, -jnp.inf)
    if not params.sample:
        return greedy_BV
    is_greedy_B = params.temperature == 0
    sampled_BV = _if_any(params, ~is_greedy_B, lambda: _sampled(logits_BV, params), lambda: greedy_BV)
    return jnp.where(is_greedy_B[:, None], greedy_BV, sampled_BV)


def _sampled(logits_BV: jax.Array, params: SamplingParams) -> jax.Array:
    """`log_distribution` of rows that are not greedy, from adjusted logits."""
    shifted_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    kept_BV = shifted_BV
    if params.truncate:
        needs_B = (params.temperature > 0) & ((params.top_k > 0) | (params.top_p < 1))
        kept_BV = _if_any(params, needs_B, lambda: _truncated(shifted_BV, params), lambda: shifted_BV)
    kept_BV = jnp.where(kept_BV >= jnp.log(params.min_p)[:, None], kept_BV, -jnp.inf)
    return jax.nn.log_softmax(kept_BV / jnp.where(params.temperature == 0, 1.0, params.temperature)[:, None], axis=-1)


def _truncated(logits_BV: jax.Array, params: SamplingParams) -> jax.Array:
    return _keep_top_p(_keep_top_k(logits_BV, params.top_k), params.top_p)


def draw(log_probs_BV: jax.Array, keys_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """Draw one token id a row (int32) from log-probabilities, by the Gumbel-max rule.

    The randomness is `fold_in(keys_B[b], position_B[b])`, position being where in the row's tokens the drawn one will
    stand: a row's tokens depend on its key and its own past, never on its neighbours or on when it was drawn.
    """

    def gumbel_V(key, position):
        return jax.random.gumbel(jax.random.fold_in(key, position), log_probs_BV.shape[1:], jnp.float32)

    return jnp.argmax(log_probs_BV + jax.vmap(gumbel_V)(keys_B, position_B), axis=-1).astype(jnp.int32)


def next_token(
    logits_BV: jax.Array, params: SamplingParams, past: History | None, keys_B: jax.Array, position_B: jax.Array
) -> jax.Array:
    """Choose one token id a row (int32): `draw` from `log_distribution`, or a plain argmax if every row is greedy."""

    def argmax() -> jax.Array:
        return jnp.argmax(adjust(logits_BV, params, past), axis=-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        return draw(log_distribution(logits_BV, params, past), keys_B, position_B)

    return _if_any(params, params.temperature > 0, drawn, argmax) if params.sample else argmax()


def has_distribution(logits_BV: jax.Array) -> jax.Array:
    """bool (B,): a row of logits is one that tokens can be drawn from: no NaN, no +inf, not all -inf.

    The maximum alone does not tell: on the CPU that of a large array loses NaN.
    """
    broken_BV = jnp.isnan(logits_BV) | (logits_BV == jnp.inf)
    kind_BV = jnp.where(broken_BV, 2, jnp.where(logits_BV > -jnp.inf, 1, 0))
    return jnp.max(kind_BV, axis=-1) == 1  # one reduction in place of two


def token_logprobs(logits_BV: jax.Array, token_B: jax.Array, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of the chosen token (B,) and of the `top` most likely ones: ids (B, N), values (B, N).

    They are the model's own, before bias, penalties, truncation and temperature, as llama.cpp's server and
    OpenAI-compatible servers report them.
    """
    log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    top_BN, top_ids_BN = lax.top_k(log_probs_BV, top)
    return jnp.take_along_axis(log_probs_BV, token_B[:, None], axis=1)[:, 0], top_ids_BN.astype(jnp.int32), top_BN


def _keep_top_k(logits_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """Set all but the k largest logits of each row to -inf (k = 0: none)."""
    k_B = jnp.where(top_k_B == 0, logits_BV.shape[1], jnp.minimum(top_k_B, logits_BV.shape[1]))
    return _keep_mass(logits_BV, jnp.ones_like(logits_BV, jnp.int32), k_B)


def _keep_top_p(logits_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Set all but the fewest largest logits whose share of the probability reaches p to -inf (p = 1: none)."""
    weight_BV = jnp.exp(logits_BV)
    target_B = jnp.maximum(top_p_B * jnp.sum(weight_BV, axis=-1), jnp.finfo(weight_BV.dtype).tiny)
    kept_BV = _keep_mass(logits_BV, weight_BV, target_B)
    return jnp.where(top_p_B[:, None] < 1, kept_BV, logits_BV)


def _keep_mass(logits_BV: jax.Array, weight_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """Keep the fewest largest logits whose weights add up to `target_B`; the others become -inf.

    Instead of sorting the vocabulary, the smallest kept logit is found bit by bit: floats compare like the integers
    their bits spell (after a flip of signs), and the weight above a threshold only falls as the threshold rises. That
    is 32 passes over V, exact, and 5 to 30 times as fast as a sort on a CPU.
    """
    bits_BV = lax.bitcast_convert_type(logits_BV, jnp.uint32)
    order_BV = jnp.where(bits_BV >> 31 == 1, ~bits_BV, bits_BV | jnp.uint32(1 << 31))

    def refine(i, threshold_B):
        candidate_B = threshold_B | (jnp.uint32(1 << 31) >> jnp.uint32(i))
        mass_B = jnp.sum(jnp.where(order_BV >= candidate_B[:, None], weight_BV, 0), axis=-1)
        return jnp.where(mass_B >= target_B, candidate_B, threshold_B)

    threshold_B = lax.fori_loop(0, _ORDER_BITS, refine, jnp.zeros(logits_BV.shape[0], jnp.uint32))
    return jnp.where(order_BV >= threshold_B[:, None], logits_BV, -jnp.inf)
