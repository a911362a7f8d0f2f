"""Prompts in, completions out: `generate` and `stream`, what users and the command line call.

Checks prompts and settings, makes requests of them, and runs these in batches (`decode.batch`).
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from realm_jax.decode.batch import batch_deltas, run_batch
from realm_jax.decode.completion import Completion
from realm_jax.decode.draft_models import DraftLike, PreparedDraft, prepare_optional_draft
from realm_jax.decode.prompts import Prompt, Request, make_requests
from realm_jax.decode.settings import Settings
from realm_jax.errors import RequestError
from realm_jax.lora.stack import AdapterLike
from realm_jax.model.model import Model


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    logprobs: int = 0,
    adapter: AdapterLike | None = None,
    adapter_index: Sequence[int] | None = None,
    draft: DraftLike | None = None,
    draft_tokens: int = 4,
    draft_adaptive: bool = False,
    draft_adapter: AdapterLike | None = None,
    add_special: bool = True,
    parse_special: bool = False,
    on_text: Callable[[int, str], None] | None = None,
    batch_size: int = 32,
) -> list[Completion]:
    """Go on with each prompt; returns one completion a prompt, in order.

    prompts: a string or a list of token ids, or a list of these. max_new_tokens to logprobs: see `Settings`. Prompt i
    has seed `seed + i`: its tokens are those of a call with it alone and that seed. adapter: one, or several that act
    together (see `lora.stack.AdapterLike`), for all prompts; or a stack of them (`lora.stack`), of which prompt i takes
    the entry `adapter_index[i]`, 0 = none. draft: for speculative decoding: a model of the same vocabulary, the path of
    one, "ngram", or "self:FORMAT" (see `draft_models.DraftLike`), which proposes up to draft_tokens tokens a round, by
    rows' acceptance fewer or none if draft_adaptive; the tokens are distributed as without, and greedy ones the same.
    add_special, parse_special: for
    prompts that are strings, as in `Tokenizer.encode`. on_text: called with a prompt's index and each new piece of
    its text as it comes. batch_size: how many prompts run together at most; the cache
    takes memory for each.

    A token budget that would pass the model's context length is cut to it (stop_reason "length"). Raises RequestError
    for prompts or settings that cannot be served, AdapterError for an adapter that does not fit, and RealmError if the
    model's logits are not finite.
    """
    settings = Settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=logit_bias,
        stop=stop,
        seed=seed,
        logprobs=logprobs,
    )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise RequestError(f"batch_size is {batch_size!r}; it must be a whole number, 1 or more")
    requests = make_requests(model, prompts, settings, add_special=add_special, parse_special=parse_special)
    if adapter_index is not None and len(adapter_index) != len(requests):
        raise RequestError(f"adapter_index has {len(adapter_index)} entries for {len(requests)} prompts: give one each")
    deltas = batch_deltas(model, adapter, None, batch_size) if adapter_index is None else None
    ahead = _draft(model, requests, draft, draft_tokens, draft_adaptive, draft_adapter)
    completions: list[Completion] = []
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        if adapter_index is not None:
            deltas = batch_deltas(model, adapter, adapter_index[first : first + batch_size], len(batch))
        pieces = run_batch(model, batch, on_text is not None, deltas, ahead)
        completions += _drain(pieces, on_text)
    return completions


class TextStream(Iterator[str]):
    """The pieces of one completion's text, each made of whole characters.

    completion: the whole result, once the last piece has been taken; None before.
    """

    def __init__(self, pieces: Generator[tuple[int, str], None, list[Completion]]):
        self.completion: Completion | None = None
        self._pieces = pieces

    def __next__(self) -> str:
        try:
            return next(self._pieces)[1]
        except StopIteration as end:
            if end.value is not None:
                (self.completion,) = end.value
            raise StopIteration from None


def stream(
    model: Model,
    prompt: Prompt,
    *,
    adapter: AdapterLike | None = None,
    draft: DraftLike | None = None,
    draft_tokens: int = 4,
    draft_adaptive: bool = False,
    draft_adapter: AdapterLike | None = None,
    add_special: bool = True,
    parse_special: bool = False,
    **settings,
) -> TextStream:
    """Go on with one prompt, piece by piece: iterate over the result for text, then read its `completion`.

    settings: the fields of `Settings`, as in `generate`, which gives the same text. Errors are those of `generate`.
    """
    requests = make_requests(
        model, [prompt], Settings(**settings), add_special=add_special, parse_special=parse_special
    )
    ahead = _draft(model, requests, draft, draft_tokens, draft_adaptive, draft_adapter)
    return TextStream(run_batch(model, requests, True, batch_deltas(model, adapter, None, 1), ahead))


def _draft(
    model: Model,
    requests: Sequence[Request],
    draft: DraftLike | None,
    tokens: int,
    adaptive: bool,
    adapter: AdapterLike | None,
) -> PreparedDraft | None:
    """The draft, checked against the model and the requests that it is to run ahead of."""
    prepared = prepare_optional_draft(model, draft, tokens, adaptive=adaptive, adapter=adapter)
    for request in requests if prepared and prepared.context_length is not None else ():
        needed = min(len(request.tokens) + request.settings.max_new_tokens, model.config.context_length)
        if needed > prepared.context_length:
            raise RequestError(
                f"prompt {request.index} and its new tokens are {needed} tokens; the draft {prepared.name} is made for "
                f"{prepared.context_length}: give fewer, or another draft"
            )
    return prepared


def _drain(
    pieces: Generator[tuple[int, str], None, list[Completion]], on_text: Callable[[int, str], None] | None
) -> list[Completion]:
    """Hand every piece on; returns what the generator returns."""
    while True:
        try:
            index, piece = next(pieces)
        except StopIteration as end:
            return end.value
        if on_text is not None:
            on_text(index, piece)
