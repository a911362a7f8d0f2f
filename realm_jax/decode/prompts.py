"""From what a caller passes to `generate` to checked requests: one prompt's token ids and settings each."""

import dataclasses
import operator
from collections.abc import Sequence

from realm_jax.decode.settings import Settings
from realm_jax.errors import RequestError
from realm_jax.model.model import Model

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt of a call: its index there, its token ids, and its checked settings."""

    index: int
    tokens: list[int]
    settings: Settings


def make_requests(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    settings: Settings,
    *,
    add_special: bool = True,
    parse_special: bool = False,
) -> list[Request]:
    """Tokenize and check a call's prompts; the request of prompt i has the seed `settings.seed + i` modulo 2**64.

    prompts: one prompt (a string or a sequence of token ids) or a sequence of prompts. Raises RequestError naming the
    setting, or the prompt by its index.
    """
    settings = checked_settings(model, settings)
    requests = []
    for index, prompt in enumerate(_as_list(prompts)):
        where = f"prompt {index}"
        tokens = prompt_tokens(model, prompt, where, add_special, parse_special)
        check_length(len(tokens), settings.max_new_tokens, model.config.context_length, where)
        seeded = dataclasses.replace(settings, seed=(settings.seed + index) % 2**64)
        requests.append(Request(index, tokens, seeded))
    return requests


def checked_settings(model: Model, settings: Settings) -> Settings:
    """The settings, checked, of a prompt for this model. Raises RequestError naming the first that cannot be met."""
    settings = settings.checked(model.config.vocab_size)
    if settings.stop and model.tokenizer is None:
        raise RequestError("stop strings need a tokenizer, and the model has none; leave stop empty")
    return settings


def check_length(tokens: int, max_new_tokens: int, context_length: int, where: str) -> None:
    """Raise RequestError for a prompt without tokens, or one that leaves no room in the context for a new token."""
    if tokens == 0:
        raise RequestError(f"{where} has no tokens; at least one is needed (a text, or the id of a BOS token)")
    most = context_length - (max_new_tokens > 0)
    if tokens > most:
        raise RequestError(
            f"{where} has {tokens} tokens; at most {most} fit in the model's context of {context_length}"
            f"{' with a new one' if max_new_tokens else ''}"
        )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (_is_sequence(prompts) and len(prompts) > 0 and _is_id(prompts[0])):
        return [prompts]
    if not _is_sequence(prompts):
        raise RequestError(f"prompts is {_kind(prompts)}; it must be a string, a list of token ids, or a list of these")
    return list(prompts)


def prompt_tokens(model: Model, prompt: Prompt, where: str, add_special: bool, parse_special: bool) -> list[int]:
    """The token ids of one prompt. Raises RequestError, in which `where` names the prompt."""
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise RequestError(f"{where} is a text, and the model has no tokenizer; pass token ids")
        try:
            prompt = model.tokenizer.encode(prompt, special=add_special, parse_special=parse_special)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
    elif not _is_sequence(prompt):
        raise RequestError(f"{where} is {_kind(prompt)}; it must be a string or a list of token ids")
    vocab_size = model.config.vocab_size
    for place, token in enumerate(prompt):
        if not _is_id(token) or not 0 <= token < vocab_size:
            raise RequestError(f"{where} has {token!r} at place {place}; token ids go from 0 to {vocab_size - 1}")
    return [operator.index(token) for token in prompt]


def _is_id(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0


def _is_sequence(value: object) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (str, bytes, dict))


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"
