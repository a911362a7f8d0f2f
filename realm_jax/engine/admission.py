"""From a request to what the device gets of it: checks, and the arrays of new rows. Called by the engine."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from realm_jax.decode import settings as packing
from realm_jax.decode.prompts import check_length, checked_settings, prompt_tokens
from realm_jax.decode.settings import Settings
from realm_jax.engine.device import Admission
from realm_jax.engine.request import Handle, Request
from realm_jax.errors import RequestError
from realm_jax.model.model import Model


@dataclass(frozen=True)
class Limits:
    """What a request may ask for. max_len: tokens of a slot. adapters: their names. bias: entries of a logit bias.

    logprobs: top log-probabilities. draft_context: of the draft model, None for n-grams or no draft.
    """

    max_len: int
    adapters: tuple[str, ...]
    bias: int
    logprobs: int
    draft_context: int | None


def check(model: Model, request: Request, limits: Limits) -> tuple[list[int], Settings]:
    """The prompt's token ids and the settings of a request that can be served. Raises RequestError for another."""
    if not isinstance(request, Request):
        raise RequestError(f"a request is of type {type(request).__name__}; it must be a realm_jax.Request")
    name = "request" if request.id is None else f"request {request.id!r}"
    try:
        request.check_treatment(limits.adapters)
        settings = checked_settings(model, request)
        for what, asked, most in (
            ("logit_bias", len(settings.logit_bias), limits.bias),
            ("logprobs", settings.logprobs, limits.logprobs),
        ):
            if asked > most:
                raise RequestError(f"{what} asks for {asked}; the engine was made for at most {most} (max_{what})")
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from None
    tokens = prompt_tokens(model, request.prompt, f"{name}: its prompt", request.add_special, request.parse_special)
    check_length(len(tokens), settings.max_new_tokens, model.config.context_length, f"{name}: its prompt")
    _check_room(name, model, len(tokens), settings.max_new_tokens, request.speculate, limits)
    return tokens, settings


def _check_room(name: str, model: Model, prompt: int, budget: int, speculate: bool, limits: Limits) -> None:
    needed = min(prompt + budget, model.config.context_length)
    if needed > limits.max_len:
        raise RequestError(
            f"{name}: its prompt of {prompt} tokens and {budget} new ones never fit into a slot of {limits.max_len}: "
            f"ask for fewer, or make the engine with a larger max_len"
        )
    if speculate and limits.draft_context is not None and needed > limits.draft_context:
        raise RequestError(
            f"{name}: {needed} tokens are more than the draft is made for ({limits.draft_context}): ask for fewer, or "
            f"set speculate to False"
        )


def admission(
    arrivals: Sequence[tuple[int, np.ndarray, Handle, int]],
    slots: int,
    size: int,
    vocab_size: int,
    context_length: int,
    bias: int,
    draft_tokens: int,
) -> Admission:
    """The arrays of new rows, each at the place of its slot. arrivals: slot, prompt (int32), handle and adapter."""
    tokens_BS = np.zeros((slots, size), np.int32)
    mask_B = np.zeros(slots, bool)
    length_B, limit_B, adapter_B, propose_B = (np.zeros(slots, np.int32) for _ in range(4))
    by_slot, seeds = [Settings()] * slots, [0] * slots
    for b, prompt, handle, adapter in arrivals:
        settings, n = handle.settings, len(prompt)
        mask_B[b], length_B[b], adapter_B[b] = True, n, adapter
        tokens_BS[b, :n] = prompt
        limit_B[b] = min(n + settings.max_new_tokens, context_length)
        propose_B[b] = draft_tokens if handle.request.speculate else 0
        by_slot[b], seeds[b] = settings, settings.seed
    return Admission(
        mask_B=mask_B,
        tokens_BS=tokens_BS,
        length_B=length_B,
        limit_B=limit_B,
        keys_B=packing.row_keys(seeds),
        params=packing.pack(by_slot, slots, vocab_size, mixed_bias=bias),
        adapter_B=adapter_B,
        propose_B=propose_B,
    )
