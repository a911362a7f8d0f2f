"""Whether two models speak of the same tokens. Called where one is measured against, or drafts for, the other."""

from realm_jax.errors import RequestError
from realm_jax.model.model import Model


def check_same_vocabulary(model: Model, other: Model, name: str) -> None:
    """Raises RequestError, saying how they differ, unless both models give every token id the same meaning.

    name: what the other model is, for the message.
    """
    ours, theirs = model.config.vocab_size, other.config.vocab_size
    if ours != theirs:
        raise RequestError(f"the {name} has {theirs} tokens and the model {ours}: both must have the same vocabulary")
    here, there = (m.origin.fields.get("tokenizer.ggml.tokens") for m in (model, other))
    if here is None or there is None:
        return
    for token, (mine, its) in enumerate(zip(here.value, there.value, strict=False)):
        if mine != its:
            raise RequestError(
                f"token {token} is {its!r} in the {name} and {mine!r} in the model: both must have the same vocabulary"
            )
