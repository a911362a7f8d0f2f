"""Several adapters for one model: acting together, or one for each row of a batch.

Whatever a caller passes as `adapter` becomes, in `deltas_for`, the one tree of deltas that the forward pass takes.

Shape suffixes: `A` adapters of a stack (0 = none), `B` batch rows, `N` outputs, `K` inputs, `R` rank.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.errors import AdapterError
from realm_jax.kernels.delta import Delta
from realm_jax.lora.adapter import Adapter, Path, build_deltas, delta_paths, fit, map_deltas, target_specs
from realm_jax.lora.files import load_adapter
from realm_jax.model.model import Model
from realm_jax.model.params import Params, get_weight

One = Adapter | str | os.PathLike
AdapterLike = One | Sequence[One | tuple[One, float]]
"""An adapter, a file of one, or several of these that act together, each alone or with a scale: [a, (b, 0.5)]."""


def deltas_for(
    model: Model, adapter: AdapterLike | None, index: Sequence[int] | jax.Array | None = None
) -> Params | None:
    """The tree of deltas that `adapter` is for this model; None for none.

    index (B,): for a stack, which adapter each batch row takes, 0 = none. Raises AdapterError for what does not fit,
    a scale that is not finite, a stack without an index, an index without a stack or outside of it.
    """
    if adapter is None:
        if index is not None:
            raise AdapterError("an adapter index was given, and no stack of adapters that it points into")
        return None
    if isinstance(adapter, Sequence) and not isinstance(adapter, str):
        if index is not None:
            raise AdapterError("an adapter index is for one stack of adapters; make it with lora.stack")
        return combine([_fitted(model, entry) for entry in adapter], model.config.layers)
    fitted = _fitted(model, adapter)
    if fitted.stacked != (index is not None):
        raise AdapterError(
            f"{fitted.source}: is a stack of adapters: say by index which one each row takes"
            if fitted.stacked
            else f"{fitted.source}: is one adapter, which takes no index; make a stack with lora.stack"
        )
    return fitted.deltas if index is None else select(fitted, index)


def _fitted(model: Model, entry: One | tuple[One, float]) -> Adapter:
    scale = 1.0
    if isinstance(entry, tuple):
        entry, scale = entry
    if isinstance(entry, (str, os.PathLike)):
        entry = load_adapter(entry)
    if not isinstance(entry, Adapter):
        raise AdapterError(f"adapter is of type {type(entry).__name__}; want an Adapter, a path, or a list of these")
    if not isinstance(scale, jax.Array) and not math.isfinite(scale):
        raise AdapterError(f"{entry.source}: its scale is {scale}; it must be finite")
    entry = fit(entry, model)
    return entry if isinstance(scale, float) and scale == 1.0 else entry.scaled(scale)


def combine(adapters: Sequence[Adapter], layers: int) -> Params:
    """The deltas of several fitted adapters that act together: leaves are tuples of `Delta`s, one an adapter."""
    for adapter in adapters:
        if adapter.stacked:
            raise AdapterError(f"{adapter.source}: is a stack, which cannot act together with other adapters")
    together: dict[Path, tuple[Delta, ...]] = {}
    for adapter in adapters:
        for path, delta in adapter.items():
            together[path] = (*together.get(path, ()), delta)
    return build_deltas(together, layers)


def stack(adapters: Sequence[One], model: Model) -> Adapter:
    """A stack of A = len(adapters) + 1 for one model: entry 0 changes nothing, entry i is `adapters[i - 1]`.

    Every delta gets a leading axis (A,); ranks are padded with zeros to the largest of each weight, and an adapter that
    leaves a weight alone has zeros there. Works under `jax.vmap` over that axis too, one adapter at a time.
    Raises AdapterError for an adapter that does not fit.
    """
    fitted = [_fitted(model, adapter) for adapter in adapters]
    for adapter in fitted:
        if adapter.stacked:
            raise AdapterError(f"{adapter.source}: is a stack already; stack single adapters")
    specs = target_specs(model.config)
    stacked = {}
    for path in delta_paths(model.config.layers):
        deltas = [get_weight(adapter.deltas, path) for adapter in fitted]
        if any(delta is not None for delta in deltas):
            stacked[path] = _stacked(
                [None, *deltas], specs[path].shape, lengths=specs[path].shape[path == ("embedding",)]
            )
    config = model.config
    return Adapter(
        build_deltas(stacked, config.layers),
        source=f"stack of {len(fitted)}",
        architecture=config.architecture,
        heads=(config.heads, config.kv_heads),
        fitted=True,
    )


def _stacked(deltas: Sequence[Delta | None], shape: tuple[int, int], lengths: int) -> Delta:
    """One delta with a leading axis. lengths: how many magnitudes a DoRA delta of this weight has."""
    N, K = shape
    R = max(delta.rank for delta in deltas if delta is not None)
    dora = any(delta is not None and delta.magnitude is not None for delta in deltas)
    dtype = jnp.result_type(*(x for delta in deltas if delta is not None for x in (delta.a, delta.b)))
    # The factor of a row without DoRA is 1 / sqrt(1 + 0 + 0): exactly 1, whatever the scale.
    plain = (jnp.ones(lengths, jnp.float32), jnp.zeros((3, lengths), jnp.float32).at[0].set(1))

    def padded(delta: Delta | None) -> Delta:
        if delta is None:
            delta = Delta(jnp.zeros((R, K), dtype), jnp.zeros((N, R), dtype), jnp.float32(0))
        missing = R - delta.rank
        a, b = jnp.pad(delta.a, ((0, missing), (0, 0))), jnp.pad(delta.b, ((0, 0), (0, missing)))
        magnitude, norms = (delta.magnitude, delta.norms) if delta.magnitude is not None else plain
        extra = (magnitude.astype(jnp.float32), norms) if dora else (None, None)
        return Delta(a.astype(dtype), b.astype(dtype), jnp.asarray(delta.scale, jnp.float32), *extra)

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(padded, deltas))


def select(stacked: Adapter, index_B: Any) -> Params:
    """The deltas of each batch row, leaves (B, ...): row b takes entry `index_B[b]` of the stack.

    AdapterError where an index is outside of the stack; traced ones are clipped.
    """
    if not isinstance(index_B, jax.core.Tracer):
        index_B = np.asarray(index_B)
        count = next((delta.a.shape[0] for _, delta in stacked.items()), 1)
        if index_B.ndim != 1 or not np.issubdtype(index_B.dtype, np.integer):
            raise AdapterError(f"the adapter index must be one whole number a row; got {index_B.dtype} {index_B.shape}")
        for row, index in enumerate(index_B.tolist()):
            if not 0 <= index < count:
                raise AdapterError(
                    f"row {row} asks for adapter {index}; the stack has 1 to {count - 1}, and 0 for none"
                )
    index_B = jnp.asarray(index_B, jnp.int32)
    return map_deltas(lambda d: jax.tree.map(lambda x: jnp.take(x, index_B, axis=0, mode="clip"), d), stacked.deltas)
