"""Adapters merged into a model, every tensor put back into its own ggml format: `realm.merge`.

A weight is unpacked, added to and encoded in stripes of rows, so it never stands in float32 as a whole. The arithmetic
is in `lora.merge`; what a merge costs is measured in `merge_report`.

Shape suffixes: `R` rows of a stripe, `N` output features, `K` input features.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp

from realm_jax.errors import RealmError
from realm_jax.kernels.delta import Delta
from realm_jax.lora.adapter import Path, weight_of
from realm_jax.lora.merge import deltas_by_path, merged_rows, with_weights
from realm_jax.lora.misfit import gguf_name
from realm_jax.lora.stack import AdapterLike
from realm_jax.model.model import Model
from realm_jax.model.params import Weight, get_weight, tensor_specs
from realm_jax.quant import DEFAULT_METHOD, QuantizedTensor, quantize
from realm_jax.quant.layout import aligned_empty
from realm_jax.quantizer.encode import Errors
from realm_jax.quantizer.imatrix import Imatrix
from realm_jax.quantizer.metadata import quantized_fields
from realm_jax.quantizer.models import format_of, quantize_weight
from realm_jax.quantizer.stream import GPU_STRIPE_WEIGHTS, STRIPE_WEIGHTS

EMBEDDING, OUTPUT = ("embedding",), ("output",)
Encode = Callable[[jax.Array], Weight]  # float32 rows (R, K) -> the same rows in a format


def merge(
    model: Model,
    adapter: AdapterLike,
    *,
    scale: float = 1.0,
    format: str | None = None,
    method: str = DEFAULT_METHOD,
    imatrix: Imatrix | None = None,
    on_tensor: Callable[[str, int], None] | None = None,
) -> Model:
    """The model with w + scale * b @ a in place of every weight w that the adapter changes (DoRA: at its own length).

    adapter: one, or several that act together, as `forward` takes them. scale: multiplies theirs. format: a ggml format
    for the tensors that change; None puts each back into its own. method, imatrix: how they are encoded, as in
    `quantize_model`. on_tensor: called with the name of each tensor that is done and the number of all.

    Tensors that nothing is added to stay the same arrays, and rows of others keep their blocks where the format stays.
    Where the embedding serves as output head too and only one of the two changes, the model gets a head of its own.
    Raises AdapterError for an adapter that does not fit, and RealmError, naming the tensor, for a format without
    an encoder (before any work) and for values that are not finite or too large for the format.
    """
    deltas = deltas_by_path(model, adapter, scale)
    plan = _plan(model, deltas, format and format.upper(), method)
    weights = {}
    for path, target in plan.items():
        weight, name = weight_of(model.params, path), gguf_name(path)

        def encode(w_RK: jax.Array, name: str = name, target: str = target) -> Weight:
            return quantize_weight(model.origin.source, name, w_RK, target, imatrix, method)

        made = rebuild(weight, deltas[path], encode, embedding=path == EMBEDDING)
        if made is not weight:
            weights[path] = made
        if on_tensor:
            on_tensor(name, len(plan))
    if model.params.output is None and EMBEDDING in weights:
        weights.setdefault(OUTPUT, model.params.embedding)
    merged = with_weights(model, weights)
    if format is None or _most_common_format(merged) == _most_common_format(model):
        return merged
    fields = quantized_fields(model.origin.fields, _most_common_format(merged), imatrix)
    return merged.replace(origin=dataclasses.replace(model.origin, fields=fields))


def _plan(model: Model, deltas: Mapping[Path, tuple[Delta, ...]], format: str | None, method: str) -> dict[Path, str]:
    """The format that every changed tensor gets; each is tried on a shape first, which costs no work."""
    plan: dict[Path, str] = {}
    tried = set()
    for path in deltas:
        weight = weight_of(model.params, path)
        plan[path] = target = format or format_of(weight)
        row = jax.ShapeDtypeStruct((1, weight.shape[1]), jnp.float32)
        if (target, row.shape) in tried:
            continue
        try:
            jax.eval_shape(lambda w, target=target: quantize(w, target, method=method), row)
        except RealmError as error:
            raise RealmError(
                f"{model.origin.source}: tensor {gguf_name(path)} cannot be merged into {target}: {error}; "
                "or give the changed tensors another format (format=, --format)"
            ) from None
        tried.add((target, row.shape))
    return plan


def rebuild(
    weight: Weight, deltas: tuple[Delta, ...], encode: Encode, *, embedding: bool = False, keep: bool = True
) -> Weight:
    """The weight with what the deltas add, encoded in stripes; the weight itself where they add nothing.

    Rows that do not change keep their blocks where `encode` leaves the weight in its format. keep: False for all rows
    anew, changed or not.
    """
    made, changed = None, not keep
    for start, _, rows in stripes(weight.shape):
        own, w_RK, merged_RK = merged_rows(weight, deltas, start, rows, embedding=embedding)
        changed_R = (merged_RK != w_RK).any(1)
        changed |= bool(changed_R.any())
        part = encode(merged_RK)
        if isinstance(part, QuantizedTensor) and isinstance(weight, QuantizedTensor):
            part = part.replace(arithmetic=weight.arithmetic)
        if keep and format_of(part) == format_of(weight):
            part = jax.tree.map(functools.partial(_where_rows, changed_R), part, own)
        if made is None:
            made = jax.tree.map(lambda x: aligned_empty((weight.shape[0], *x.shape[1:]), x.dtype), part)
        for whole, piece in zip(jax.tree.leaves(made), jax.tree.leaves(part), strict=True):
            whole[start : start + rows] = piece
    return jax.device_put(made) if changed else weight


def stripes(shape: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """Over the rows of a weight (N, K): where a stripe starts, how many of its rows were in the last one, and its rows.

    All stripes have the same number of rows, so that one compilation serves them; the last reaches back for that.
    """
    N, K = shape
    rows = min(N, max(1, (STRIPE_WEIGHTS if jax.default_backend() == "cpu" else GPU_STRIPE_WEIGHTS) // K))
    for first in range(0, N, rows):
        start = min(first, N - rows)
        yield start, first - start, rows


def weight_errors(model: Model, adapter: AdapterLike, merged: Model, *, scale: float = 1.0) -> dict[str, Errors]:
    """How far the tensors of a merged model are from the sums that they were encoded from, by name."""
    found = {}
    for path, deltas in deltas_by_path(model, adapter, scale).items():
        weight, new, total = weight_of(model.params, path), weight_of(merged.params, path), Errors()
        for start, seen, rows in stripes(weight.shape):
            want_RK = merged_rows(weight, deltas, start, rows, embedding=path == EMBEDDING)[2]
            have_RK = merged_rows(new, (), start, rows)[1]
            total += Errors.between(want_RK[seen:], have_RK[seen:], None)
        found[gguf_name(path)] = total
    return found


def _where_rows(changed_R: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(changed_R.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _most_common_format(model: Model) -> str:
    """The format that most weights of the model's matrices have."""
    count: Counter[str] = Counter()
    for spec in tensor_specs(model.config):
        weight = get_weight(model.params, spec.path)
        if weight is not None and weight.ndim > 1:
            count[format_of(weight)] += math.prod(weight.shape)
    return count.most_common(1)[0][0]
