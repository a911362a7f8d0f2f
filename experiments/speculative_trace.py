"""Speculative decoding round by round, and what acceptance must be there, found another way.

A draft token at a place with context x is accepted with probability sum over tokens of min(p, q), p and q being what
target and draft give after x. Whether a place is judged depends on what came before it alone, so accepted less the
sum of these probabilities b is a sum of differences of mean 0, a martingale, with variance sum of b (1 - b),
however much places hang together.

`overlaps` takes nothing from `realm_jax.decode`: it runs both models over the finished text without a cache, applies
the temperature in float64, and looks up n-grams in plain Python. Greedy, every probability is 0 or 1, and the counts
are equal.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.decode import buckets
from realm_jax.decode.drafts import Draft
from realm_jax.decode.loop import init_state, prefill
from realm_jax.decode.prompts import Request
from realm_jax.decode.speculative import begin, decode, prefill_draft
from realm_jax.model import Config, Model, Params, run, unembed


class Round(NamedTuple):
    """start: length of the row before the round. drafted, judged, accepted: draft tokens.

    tokens: what the target's forward pass gave, one that ended the row included.
    """

    start: int
    drafted: int
    judged: int
    accepted: int
    tokens: int


def trace(model: Model, draft: Draft, request: Request) -> tuple[list[int], list[Round]]:
    """All tokens of a row, prompt included, and its rounds; the program and the tokens are those of `generate`."""
    prompt, budget = request.tokens, request.settings.max_new_tokens
    size = buckets.cache_bucket(min(len(prompt) + budget, model.config.context_length))
    eog_ids = model.tokenizer.eog_ids if model.tokenizer else ()
    rows = init_state(model.config, [prompt], [request.settings], eog_ids, size=size)
    chunks = buckets.prefill_chunks(len(prompt) - 1)
    for chunk in chunks:
        rows = prefill(model.params, model.config, rows, chunk, None)
    state = begin(rows, draft)
    for chunk in chunks:
        state = prefill_draft(draft, state, chunk)
    length, counted, rounds = len(prompt), np.zeros(4, int), []
    while bool(state.decode.ready_B[0]):
        state = decode(model.params, model.config, draft, state, 1, None)
        tally = jax.device_get(state.tally)
        sums = (tally.drafted_BG, tally.reached_BG, tally.accepted_BG, tally.tokens_B)
        counts = np.array([x[0].sum() for x in sums])
        rounds.append(Round(length, *(counts - counted).tolist()))
        length, counted = int(state.decode.length_B[0]), counts
    return np.asarray(state.decode.tokens_BS)[0, :length].tolist(), rounds


def overlaps(
    target: Model, draft: Model | None, tokens: list[int], rounds: list[Round], temperature: float, most: int
) -> np.ndarray:
    """For each place that was judged: the probability that its draft token is accepted, sum over tokens of min(p, q).

    draft: None for n-grams. most: new tokens of any row, so that all rows have one shape.
    """
    size = buckets.cache_bucket(rounds[0].start + most) if rounds else 0
    p_TV = probabilities(target, tokens, size, temperature) if rounds else None
    q_TV = probabilities(draft, tokens, size, temperature) if rounds and draft is not None else None
    found = []
    for one in rounds:
        proposed = lookup(tokens[: one.start], one.judged) if draft is None else []
        for place in range(one.judged):
            last = one.start + place - 1
            found.append(p_TV[last, proposed[place]] if draft is None else np.minimum(p_TV[last], q_TV[last]).sum())
    return np.array(found)


def probabilities(model: Model, tokens: list[int], size: int, temperature: float) -> np.ndarray:
    """What the model draws from after each token, (T, V) float64; temperature 0: all on the largest logit."""
    padded = jnp.array([tokens + [0] * (size - len(tokens))], jnp.int32)
    logits_TV = np.asarray(_logits(model.params, model.config, padded)[0, : len(tokens)], np.float64)
    if temperature == 0:
        return np.eye(logits_TV.shape[1])[logits_TV.argmax(1)]
    e_TV = np.exp((logits_TV - logits_TV.max(1, keepdims=True)) / temperature)
    return e_TV / e_TV.sum(1, keepdims=True)


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: Params, config: Config, tokens_BT: jax.Array) -> jax.Array:
    return unembed(params, config, run(params, config, tokens_BT)[0])


def lookup(tokens: list[int], most: int) -> list[int]:
    """What followed the last 3 tokens when they stood there last; else the last 2, else the last one."""
    for n in (3, 2, 1):
        for at in range(len(tokens) - 1, n - 1, -1):
            if tokens[at - n : at] == tokens[-n:]:
                return tokens[at : at + most]
    return []
