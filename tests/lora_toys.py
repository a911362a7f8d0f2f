"""Adapters of random numbers, and the dense weights that they come to, for the tests of `realm_jax.lora`."""

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import lora
from realm_jax.kernels.delta import Delta
from realm_jax.lora.adapter import weight_of
from realm_jax.model.params import build_params, get_weight, tensor_specs


def random_adapter(model, seed=0, rank=4, targets=lora.TARGETS, dora=False, size=0.05):
    """A fitted adapter whose b, and magnitudes if `dora`, are random: it changes what the model says."""
    rng = np.random.default_rng(seed)
    adapter = lora.init_adapter(model, jax.random.key(seed), rank=rank, alpha=2.0 * rank, targets=targets, dora=dora)

    def changed(delta):
        delta = delta.replace(b=jnp.asarray(size * rng.standard_normal(delta.b.shape), jnp.float32))
        if dora:
            factor = rng.uniform(0.7, 1.4, delta.magnitude.shape)
            delta = delta.replace(magnitude=delta.magnitude * jnp.asarray(factor, jnp.float32))
        return delta

    adapter = adapter.map(changed)
    return adapter.replace(deltas=lora.refresh_norms(adapter.deltas, model.params), source=f"adapter {seed}")


def dense(weight) -> np.ndarray:
    """Any weight in float64."""
    return np.asarray(weight.dequantize() if hasattr(weight, "planes") else weight, np.float64)


def changed_weight(weight, delta: Delta, columns: bool = False) -> np.ndarray:
    """What a weight comes to with one delta, in float64, written out. columns: DoRA's lengths are those of columns."""
    w = dense(weight)
    out = w + float(delta.scale) * np.asarray(delta.b, np.float64) @ np.asarray(delta.a, np.float64)
    if delta.magnitude is None:
        return out
    axis = 0 if columns else 1
    factor = np.asarray(delta.magnitude, np.float64) / np.linalg.norm(out, axis=axis)
    return out * np.expand_dims(factor, axis)


def changed_model(model, adapter):
    """The model with every weight that the adapter changes written out in float32; a tied output is untied."""
    specs = {spec.path: spec for spec in tensor_specs(model.config)}
    weights = {path: get_weight(model.params, path) for path in specs}
    if weights[("output",)] is None:
        weights[("output",)] = jnp.asarray(dense(model.params.embedding), jnp.float32)
    for path, delta in adapter.items():
        new = changed_weight(weight_of(model.params, path), delta, columns=path == ("embedding",))
        weights[path] = jnp.asarray(new, jnp.float32)
    return model.replace(params=build_params(model.config, weights))
