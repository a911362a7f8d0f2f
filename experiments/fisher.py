"""What a change of the weights will do to a model's predictions, from gradients alone: the Fisher information.

To second order, the divergence of the changed model from the float one is KL = 1/2 d' F d, with the change d of all
weights and the Fisher information F = E[g g'], where g is the gradient of log p(y) and y is drawn from the *model's*
own prediction p, not taken from the text (which gives the "empirical Fisher": see Kunstner et al. 2019, "Limitations of
the empirical Fisher approximation"). Two estimates of the form 1/2 d' F d for the change d of one tensor:

    diagonal      1/2 sum_i F_ii d_i^2, as if errors of different weights did not act together
    directional   1/2 E[(g . d)^2], the form itself: no diagonal, no approximation, only the noise of sampling

A draw of y is one of many random vectors with the covariance diag(p) - p p' at the logits, and E[g g'] depends on this
covariance alone. Where p is nearly 1 for one token, drawing y says nothing most of the time and very much very seldom.
So g comes from sqrt(p) * n - p * (sqrt(p) . n) with normal n, which has the same covariance and no rare events.
Independent draws at all positions of a chunk share one backward pass, since their gradients are uncorrelated.

Used by `quant_sensitivity.py`. Shapes: B chunks a step, T tokens a chunk, W scored tokens, V vocabulary, M draws,
Z candidate changes of a tensor, S samples (a chunk and a draw).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from quant_setup import replace_weights
from realm_jax.evaluate import Estimate
from realm_jax.model import Config, Model, Params, run, unembed
from realm_jax.model.params import get_weight, tensor_specs

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Fisher:
    """Sampled gradients, as far as they concern some candidate changes of some tensors.

    diagonal: tensor -> float64 (Z,), sum_i F_ii d_i^2 a token. products: tensor -> float64 (S, Z), the products g . d,
    scaled so that their mean square is d' F d a token. draws: M; samples of one chunk stand together.
    """

    diagonal: dict[str, np.ndarray]
    products: dict[str, np.ndarray]
    draws: int

    def diagonal_kl(self, tensor: str) -> np.ndarray:
        """The diagonal estimate of the KL divergence of each candidate, nats a token, (Z,)."""
        return self.diagonal[tensor] / 2

    def directional_kl(self, tensor: str) -> list[Estimate]:
        """The directional estimate of the same, with its standard error over chunks."""
        return [self._of_products(products_S) for products_S in self.products[tensor].T]

    def joint_kl(self, choice: dict[str, int]) -> Estimate:
        """The directional estimate for candidates (by index) of several tensors at once, acting together."""
        return self._of_products(sum(self.products[tensor][:, index] for tensor, index in choice.items()))

    def _of_products(self, products_S: np.ndarray) -> Estimate:
        return Estimate.of((products_S**2 / 2).reshape(-1, self.draws).mean(axis=1))


def sample_fisher(
    model: Model, chunks_NT: np.ndarray, changes: dict[str, np.ndarray], *, draws: int, seed: int
) -> Fisher:
    """Estimates on a text for changes of dense float32 tensors, name -> float32 (Z, *shape).

    The second half of every chunk counts, as in `realm_jax.evaluate`. Needs memory for all changes and one gradient.
    """
    specs = tensor_specs(model.config)
    paths = tuple((spec.name, spec.path) for spec in specs if spec.name in changes)
    weights = {name: get_weight(model.params, path) for name, path in paths}
    on_device = {name: jnp.asarray(change) for name, change in changes.items()}
    square = jax.tree.map(jnp.zeros_like, weights)
    key, products = jax.random.key(seed), []
    for i, tokens_T in enumerate(chunks_NT):
        keys_M = jax.random.split(jax.random.fold_in(key, i), draws)
        square, part = _sample(weights, model.params, model.config, paths, tokens_T, keys_M, on_device, square)
        products.append(jax.tree.map(np.asarray, part))
    scored = chunks_NT.shape[1] - chunks_NT.shape[1] // 2 - 1
    share = 1 / (scored * len(chunks_NT) * draws)
    diagonal = {name: share * np.asarray(_weighted(square[name], on_device[name]), np.float64) for name in weights}
    joined = {name: np.concatenate([part[name] for part in products]) for name in weights}
    return Fisher(diagonal, {name: p_SZ.astype(np.float64) / np.sqrt(scored) for name, p_SZ in joined.items()}, draws)


@jax.jit
def _weighted(square: jax.Array, change_ZNK: jax.Array) -> jax.Array:
    return jnp.einsum("nk,znk->z", square, jnp.square(change_ZNK))


@functools.partial(jax.jit, static_argnames=("config", "paths"), donate_argnames="square")
def _sample(
    weights: Arrays,
    params: Params,
    config: Config,
    paths: tuple[tuple[str, tuple[str | int, ...]], ...],
    tokens_T: jax.Array,
    keys_M: jax.Array,
    changes: Arrays,
    square: Arrays,
) -> tuple[Arrays, Arrays]:
    """`square` with the squared gradients of all draws on one chunk added, and the products g . d, each (M, Z)."""

    def logits_of(weights: Arrays) -> jax.Array:
        replaced = replace_weights(params, config, {path: weights[name] for name, path in paths})
        hidden_1TD, _ = run(replaced, config, tokens_T[None])
        return unembed(replaced, config, hidden_1TD[0, len(tokens_T) // 2 : -1])

    logits_WV, pull_back = jax.vjp(logits_of, weights)
    p_WV = jax.nn.softmax(logits_WV, axis=-1)

    def draw(square: Arrays, key: jax.Array) -> tuple[Arrays, Arrays]:
        scaled_WV = jnp.sqrt(p_WV) * jax.random.normal(key, p_WV.shape)
        [gradient] = pull_back(scaled_WV - p_WV * scaled_WV.sum(-1, keepdims=True))
        products = jax.tree.map(lambda g, d: jnp.einsum("nk,znk->z", g, d), gradient, changes)
        return jax.tree.map(lambda s, g: s + g * g, square, gradient), products

    return jax.lax.scan(draw, square, keys_M)
