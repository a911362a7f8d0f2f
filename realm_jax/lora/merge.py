"""Adapters merged into weights and taken out again: the arithmetic, row by row. `quantizer.merging` calls this.

Shape suffixes: `R` rows of a stripe, `N` output features, `K` input features.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.errors import AdapterError
from realm_jax.gguf.types import Field
from realm_jax.kernels.delta import HIGHEST, Delta, dora_factor
from realm_jax.lora.adapter import Adapter, Path, delta_paths, target_specs
from realm_jax.lora.stack import AdapterLike, One, deltas_for
from realm_jax.model.model import Model
from realm_jax.model.params import Weight, build_params, get_weight, tensor_specs
from realm_jax.quant.tensor import QuantizedTensor

QUANTIZATION_KEYS = ("general.file_type", "general.quantization_version", "quantize.")  # how a file is quantized


def acting_together(adapter: AdapterLike, scale: float = 1.0) -> list[tuple[One, float]]:
    """The adapters that `adapter` stands for, each with its scale times `scale`."""
    several = isinstance(adapter, Sequence) and not isinstance(adapter, str)
    listed = list(adapter) if several else [adapter]
    for entry in listed:
        if isinstance(entry, Adapter) and entry.stacked:
            raise AdapterError(f"{entry.source}: is a stack of adapters; merge takes one, or a list that acts together")
    return [(e[0], e[1] * scale) if isinstance(e, tuple) else (e, scale) for e in listed]


def deltas_by_path(model: Model, adapter: AdapterLike, scale: float = 1.0) -> dict[Path, tuple[Delta, ...]]:
    """The deltas of every weight that the adapters change, in the order of the model. AdapterError for a misfit."""
    tree = deltas_for(model, acting_together(adapter, scale))
    found = {path: get_weight(tree, path) for path in delta_paths(model.config.layers)}
    return {path: deltas for path, deltas in found.items() if deltas is not None}


@functools.partial(jax.jit, static_argnames=("rows", "embedding"))
def merged_rows(
    w: Weight, deltas: tuple[Delta, ...], start: jax.Array, rows: int, *, embedding: bool = False
) -> tuple[Weight, jax.Array, jax.Array]:
    """Rows `start` to `start + rows` of a weight (N, K): packed as they are, in float32, and with what deltas add.

    The same sums as `kernels.delta` takes beside the weight; a row that nothing is added to keeps its bits. embedding:
    the lengths of DoRA are those of columns.
    """

    def part(x_N: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x_N, start, rows)

    own = jax.tree.map(part, w)
    w_RK = own.dequantize() if isinstance(own, QuantizedTensor) else own.astype(jnp.float32)
    total_RK = jnp.zeros_like(w_RK)
    for delta in deltas:
        b_RR, a_RK = part(delta.b).astype(jnp.float32), delta.a.astype(jnp.float32)
        added_RK = delta.scale * jnp.dot(b_RR, a_RK, precision=HIGHEST)
        if delta.magnitude is not None:
            factor = dora_factor(delta)[None, :] if embedding else part(dora_factor(delta))[:, None]
            added_RK = (factor - 1) * w_RK + factor * added_RK
        total_RK += added_RK
    return own, w_RK, jnp.where(total_RK == 0, w_RK, w_RK + total_RK)


def with_weights(model: Model, weights: Mapping[Path, Weight | None]) -> Model:
    """The model with other weights at some paths; None takes one out. All others stay the same arrays."""
    paths = dict.fromkeys(spec.path for spec in tensor_specs(model.config))
    all_weights = {path: get_weight(model.params, path) for path in paths} | dict(weights)
    params = build_params(model.config, {path: w for path, w in all_weights.items() if w is not None})
    return model.replace(params=params)


def unmerge(merged: Model, base: Model, adapter: AdapterLike) -> Model:
    """The merged model with the base's own tensors back wherever the adapter changes them; other edits stay.

    base: what the adapter was merged into. A model that was not edited otherwise saves to the bytes of the base's file.
    Raises AdapterError for an adapter that does not fit the base, or a base whose tensors have other shapes.
    """
    changed = set(deltas_by_path(base, adapter))
    if base.params.output is None and ("embedding",) in changed:
        changed.add(("output",))  # merging gave the model a head of its own
    here, there = target_specs(merged.config), target_specs(base.config)
    for path in changed:
        if path not in here or here[path].shape != there[path].shape:
            has = f"has shape {here[path].shape}" if path in here else "is not there"
            raise AdapterError(
                f"{merged.origin.source}: tensor {there[path].name} {has}, and has shape {there[path].shape} in "
                f"{base.origin.source}: unmerge wants the base that the adapter was merged into"
            )
    restored = with_weights(merged, {path: get_weight(base.params, path) for path in changed})
    fields = _restored_fields(merged.origin.fields, base.origin.fields)
    return restored.replace(origin=dataclasses.replace(merged.origin, fields=fields))


def _restored_fields(merged: Mapping[str, Field], base: Mapping[str, Field]) -> dict[str, Field]:
    """The metadata of the merged model, in the base's order, with what the base says of its quantization."""
    about = {key: field for key, field in base.items() if key.startswith(QUANTIZATION_KEYS)}
    others = {key: field for key, field in merged.items() if not key.startswith(QUANTIZATION_KEYS)}
    in_order = [*(key for key in base if key in about or key in others), *others]
    return {key: (about | others)[key] for key in in_order}
