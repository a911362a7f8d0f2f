"""From what a caller names as draft to a checked `Draft`: another model, the target in a cheaper format, or n-grams.

Called by `decode.generate`.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.decode.drafts import Draft
from realm_jax.errors import RealmError, RequestError
from realm_jax.lora.stack import AdapterLike, deltas_for
from realm_jax.model.files import load
from realm_jax.model.model import Model
from realm_jax.model.params import Params, Weight
from realm_jax.model.vocabulary import check_same_vocabulary
from realm_jax.quant import QuantizedTensor, get_format, quantize
from realm_jax.quant.formats import DENSE_FORMATS

MOST_TOKENS = 64
"""Draft tokens a round; more would be verified in vain."""

DraftLike = Model | str | os.PathLike
"""A model, the path of one, "ngram", or "self:FORMAT" or "self:FORMAT:LAYERS"."""


@dataclass(frozen=True)
class PreparedDraft:
    """A draft that fits its target. name: as people call it. draft: what the device gets.

    context_length: of the draft model, None for n-grams.
    """

    name: str
    draft: Draft
    context_length: int | None = None


def prepare_draft(
    model: Model,
    draft: DraftLike,
    tokens: int,
    *,
    adaptive: bool = False,
    cost: float | None = None,
    adapter: AdapterLike | None = None,
) -> PreparedDraft:
    """The draft for a target model; a model is loaded, or made of the target's own weights, as `DraftLike` says, and
    computes in the target's arithmetic.

    tokens: the most it proposes a round, 1 to MOST_TOKENS. adaptive: rows propose fewer, or none, by their acceptance.
    cost: time of a draft token over that of a target step; None: the bytes of weights that each reads. adapter: of the
    draft model. Raises RequestError for a length out of bounds, another vocabulary, a name or format that is none;
    RealmError for a model that cannot be loaded.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int | np.integer) or not 1 <= tokens <= MOST_TOKENS:
        raise RequestError(f"draft_tokens is {tokens!r}; it must be a whole number from 1 to {MOST_TOKENS}")
    if cost is not None and not 0 <= cost < float("inf"):
        raise RequestError(f"the cost of a draft token is {cost!r} target steps; it must be finite and at least 0")
    if isinstance(draft, str) and draft == "ngram":
        if adapter is not None:
            raise RequestError("a draft of n-grams has no weights for an adapter to change")
        made = Draft(None, None, jnp.float32(cost or 0.0), None, int(tokens), adaptive)
        return PreparedDraft("ngram", made)
    drafter = _draft_model(model, draft)
    check_same_vocabulary(model, drafter, "draft")
    if cost is None:
        cost = weight_bytes(drafter.params) / weight_bytes(model.params)
    deltas = deltas_for(drafter, adapter)
    made = Draft(drafter.params, deltas, jnp.float32(cost), drafter.config, int(tokens), adaptive)
    name = draft if isinstance(draft, str) and draft.startswith("self:") else drafter.origin.source
    return PreparedDraft(name, made, drafter.config.context_length)


def prepare_optional_draft(
    model: Model, draft: DraftLike | None, tokens: int, *, adaptive: bool, adapter: AdapterLike | None
) -> PreparedDraft | None:
    """As `prepare_draft`; None for no draft, which has no adapter either."""
    if draft is None and adapter is not None:
        raise RequestError("draft_adapter is for a draft, and none was given")
    return None if draft is None else prepare_draft(model, draft, tokens, adaptive=adaptive, adapter=adapter)


def _draft_model(model: Model, draft: DraftLike) -> Model:
    if isinstance(draft, Model):
        return draft
    if isinstance(draft, str) and draft.startswith("self:"):
        return self_draft(model, *_parse_self(draft, model.config.layers))
    if isinstance(draft, str | os.PathLike):
        if not Path(draft).exists():
            raise RequestError(f"draft {str(draft)!r} is no file; give a GGUF file, ngram, or self:FORMAT as self:Q2_K")
        return load(draft).with_arithmetic(model.arithmetic)
    raise RequestError(f"draft is of type {type(draft).__name__}; give a Model, a path, 'ngram' or 'self:FORMAT'")


def _parse_self(text: str, layers: int) -> tuple[str, int]:
    """Format and number of layers of `self:FORMAT[:LAYERS]`."""
    _, format, *rest = text.split(":")
    kept = rest[0] if rest else str(layers)
    if len(rest) > 1 or not kept.isdecimal() or not 1 <= int(kept) <= layers:
        raise RequestError(f"draft {text!r}: want self:FORMAT or self:FORMAT:LAYERS with 1 to {layers} layers")
    return format.upper(), int(kept)


def self_draft(model: Model, format: str, layers: int | None = None) -> Model:
    """The target as its own draft: its matrices in a cheaper format, and where `layers` is given, only so many layers.

    Those kept are spread evenly, first and last among them. Matrices that the format's blocks do not divide stay as
    they are. Raises RequestError for a format that is none or has no encoder.
    """

    def cheaper(weight: Weight) -> Weight:
        if weight.ndim < 2 or (format not in DENSE_FORMATS and weight.shape[-1] % get_format(format).block_size):
            return weight
        if isinstance(weight, QuantizedTensor) and weight.format == format:
            return weight
        return quantize(weight, format)

    count = model.config.layers
    kept = np.unique(np.linspace(0, count - 1, layers or count).round().astype(int))
    params = model.params.replace(layers=tuple(model.params.layers[i] for i in kept))
    try:
        params = jax.tree.map(cheaper, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    except RealmError as error:
        raise RequestError(f"draft self:{format}: {error}") from None
    return model.replace(params=params, config=dataclasses.replace(model.config, layers=len(kept)))


def weight_bytes(params: Params) -> int:
    """Bytes of weights that one step reads: all layers and the output matrix."""
    head = params.embedding if params.output is None else params.output
    return sum(leaf.nbytes for leaf in jax.tree.leaves((params.layers, params.norm, head)))
