"""Logits of a model, with or without adapters: the forward pass as users call it."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from realm_jax.lora.stack import AdapterLike, deltas_for
from realm_jax.model.config import Config
from realm_jax.model.model import Model
from realm_jax.model.params import Params, for_any_rows
from realm_jax.model.transformer import run, unembed


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: Params, config: Config, tokens_BT: jax.Array, deltas: Params | None) -> jax.Array:
    hidden_BTD, _ = run(params, config, tokens_BT, deltas=deltas)
    return unembed(params, config, hidden_BTD, deltas=deltas)


def forward(
    model: Model,
    tokens_BT: jax.Array,
    *,
    adapter: AdapterLike | None = None,
    adapter_index: Sequence[int] | jax.Array | None = None,
) -> jax.Array:
    """Logits after every token: (B, T) integer ids -> (B, T, V) float32. Each row starts at position 0.

    Ids must lie in [0, V); JAX clamps others silently inside `jit`, so check them where they come in. adapter: one, or
    several that act together (see `AdapterLike`); or a stack, of which row b takes entry `adapter_index[b]`, 0 = none.
    Other scales and other adapters of the same shapes run what was compiled before. A model in int8 arithmetic has it
    however many tokens there are. AdapterError for what does not fit.
    """
    deltas = deltas_for(model, adapter, adapter_index)
    return _logits(for_any_rows(model.params), model.config, jnp.asarray(tokens_BT, jnp.int32), deltas)
