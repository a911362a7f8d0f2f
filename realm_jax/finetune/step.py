"""What a training step computes on the device: loss, gradients of the adapter alone, and the optimizer. Pure functions.

Shape suffixes: `A` parts of a batch, `M` rows of a part, `B` rows, `T` tokens a row, `P` places, `D` width.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import optax

from realm_jax.evaluate import VALUES_AT_ONCE
from realm_jax.finetune.config import TrainingConfig
from realm_jax.kernels.delta import Delta
from realm_jax.lora import refresh_norms
from realm_jax.lora.adapter import map_deltas
from realm_jax.model.config import Config
from realm_jax.model.params import Params
from realm_jax.model.transformer import run, unembed

Batch = tuple[jax.Array, jax.Array, jax.Array]
"""tokens, learned, first of `rows.Rows`, each (..., T + 1)."""


@flax.struct.dataclass
class TrainState:
    """trained: `Params` of `Delta`s with a, b, magnitude alone, float32. optimizer: optax state. step: int32 scalar."""

    trained: Params
    optimizer: optax.OptState
    step: jax.Array


def init_state(deltas: Params, training: TrainingConfig) -> tuple[TrainState, Params]:
    """The state before the first step, in arrays of its own, and what stays as it is: `Delta`s of scale and norms.

    Of the norms that DoRA needs only those of the weights stay; the rest follow a and b (see `whole_deltas`).
    """

    def own(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jnp.array(x, jnp.float32, copy=True)

    trained = map_deltas(lambda d: Delta(own(d.a), own(d.b), None, own(d.magnitude)), deltas)
    fixed = map_deltas(lambda d: Delta(None, None, jnp.asarray(d.scale, jnp.float32), None, d.norms), deltas)
    return TrainState(trained, make_optimizer(training).init(trained), jnp.zeros((), jnp.int32)), fixed


def learning_rate(training: TrainingConfig, step: jax.Array | int) -> jax.Array:
    """Of step 0, 1, ...: a linear rise over the warm-up, then the schedule."""
    rise = jnp.minimum(1.0, (step + 1) / (training.warmup + 1))
    left = jnp.clip((training.steps - step) / (training.steps - training.warmup), 0.0, 1.0)
    fall = {"constant": jnp.ones_like(left), "linear": left, "cosine": 0.5 * (1 - jnp.cos(math.pi * left))}
    return training.learning_rate * rise * fall[training.schedule]


def make_optimizer(training: TrainingConfig) -> optax.GradientTransformation:
    """Clipping, then the optimizer with its schedule; weight decay on a and b, not on magnitudes."""
    rate = functools.partial(learning_rate, training)
    matrices = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
    decay = optax.add_decayed_weights(training.weight_decay, matrices)
    rule = {"adamw": optax.scale_by_adam, "lion": optax.scale_by_lion, "sgd": optax.identity}[training.optimizer]()
    clip = optax.clip_by_global_norm(training.clip) if training.clip else optax.identity()
    return optax.chain(clip, rule, decay, optax.scale_by_learning_rate(rate))


def with_fixed(trained: Params, fixed: Params) -> Params:
    """The deltas to run with: scale and norms of `fixed`, the rest of `trained`."""

    def joined(delta: Delta, fixed: Delta) -> Delta:
        return delta.replace(scale=fixed.scale, norms=fixed.norms)

    return jax.tree.map(joined, trained, fixed, is_leaf=lambda node: isinstance(node, Delta))


@jax.jit
def whole_deltas(params: Params, trained: Params, fixed: Params) -> Params:
    """The deltas of a state, with the norms that DoRA needs."""
    return jax.lax.stop_gradient(refresh_norms(with_fixed(trained, fixed), params, same_weights=True))


def summed_loss(params: Params, config: Config, deltas: Params | None, batch: Batch, training: TrainingConfig):
    """Cross-entropy in nats, float32, summed over the learned tokens of rows (B, T + 1).

    Logits of all places at once may be too many: they are made a block of places at a time, and again on the way back.
    """
    tokens_BT, learned_BT, first_BT = batch
    hidden_BTD, _ = run(
        params,
        config,
        tokens_BT[:, :-1],
        deltas=deltas,
        first_BT=first_BT[:, :-1],
        dtype=jnp.dtype(training.dtype),
        remat=training.remat,
    )

    def block_loss(block: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        hidden_PD, target_P, learned_P = block
        logits_PV = unembed(params, config, hidden_PD, deltas=deltas)
        nll_P = optax.softmax_cross_entropy_with_integer_labels(logits_PV, target_P)
        return jnp.sum(jnp.where(learned_P, nll_P, 0.0))

    places = tokens_BT[:, 1:].size
    size = max(1, min(places, VALUES_AT_ONCE // config.vocab_size))
    count = -(-places // size)

    def in_blocks(x: jax.Array) -> jax.Array:
        flat = x.reshape(places, *x.shape[2:])
        padding = [(0, count * size - places)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(count, size, *flat.shape[1:])

    blocks = jax.tree.map(in_blocks, (hidden_BTD, tokens_BT[:, 1:], learned_BT[:, 1:]))
    if count == 1:
        return block_loss(jax.tree.map(lambda x: x[0], blocks))
    return jnp.sum(jax.lax.map(jax.checkpoint(block_loss), blocks))


def gradients(
    params: Params, config: Config, trained: Params, fixed: Params, batch: Batch, training: TrainingConfig
) -> tuple[jax.Array, Params]:
    """Mean loss over the learned tokens of a batch (A, M, T + 1), and its gradient in `trained`.

    Both are sums over the parts, divided by the count of learned tokens in all of them.
    """
    fixed = whole_deltas(params, trained, fixed)

    def part_loss(trained: Params, part: Batch) -> jax.Array:
        return summed_loss(params, config, with_fixed(trained, fixed), part, training)

    def add(total: tuple, part: Batch) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(part_loss)(trained, part)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trained))
    if batch[0].shape[0] == 1:
        total = jax.value_and_grad(part_loss)(trained, jax.tree.map(lambda x: x[0], batch))
    else:
        total, _ = jax.lax.scan(add, zero, batch)
    count = jnp.maximum(1, jnp.sum(batch[1][..., 1:])).astype(jnp.float32)
    return jax.tree.map(lambda x: x / count, total)


@functools.partial(jax.jit, static_argnames=("config", "training"), donate_argnames="state")
def train_step(
    params: Params, state: TrainState, fixed: Params, batch: Batch, *, config: Config, training: TrainingConfig
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on a batch (A, M, T + 1): the new state, and loss, gradient norm before clipping, learning rate."""
    loss, gradient = gradients(params, config, state.trained, fixed, batch, training)
    updates, moments = make_optimizer(training).update(gradient, state.optimizer, state.trained)
    values = {
        "loss": loss,
        "gradient_norm": optax.tree.norm(gradient),
        "learning_rate": learning_rate(training, state.step),
    }
    return TrainState(optax.apply_updates(state.trained, updates), moments, state.step + 1), values


@functools.partial(jax.jit, static_argnames=("config", "training"))
def evaluate_step(
    params: Params, deltas: Params | None, batch: Batch, *, config: Config, training: TrainingConfig
) -> jax.Array:
    """The summed loss of rows (B, T + 1)."""
    return summed_loss(params, config, deltas, batch, training)
