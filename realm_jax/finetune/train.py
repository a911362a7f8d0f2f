"""Training an adapter on rows in memory: the host's loop. `finetune` adds files and a run directory to it."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.errors import AdapterError, RealmError
from realm_jax.experiment.checkpoints import restore_newest, save_checkpoint
from realm_jax.finetune.config import TrainingConfig
from realm_jax.finetune.rows import Order, Rows
from realm_jax.finetune.step import Batch, TrainState, evaluate_step, init_state, train_step, whole_deltas
from realm_jax.lora import Adapter, fit
from realm_jax.model.model import Model

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


@dataclass(frozen=True, eq=False)
class Data:
    """Rows to train on, and rows to measure the loss on (None: it is not measured). notes: how they came about."""

    train: Rows
    evaluation: Rows | None = None
    notes: tuple[str, ...] = ()


class Trainer:
    """An adapter in training: its state, and the data's order. `training` is the config with its steps counted out."""

    def __init__(self, model: Model, data: Data, training: TrainingConfig, adapter: Adapter, seed: int):
        self.start = fit(adapter, model)
        if self.start.stacked or not list(self.start.items()):
            kind = "a stack of adapters" if self.start.stacked else "empty"
            raise AdapterError(f"{adapter.source}: is {kind}, which cannot be trained; want one adapter")
        self.model, self.data = model, data
        self.training = training.with_steps(len(data.train))
        self.state, self.fixed = init_state(self.start.deltas, self.training)
        self.step = 0
        self._order = Order(len(data.train), training.batch, jax.random.fold_in(jax.random.key(seed), 1))
        self._step: Callable[..., tuple[TrainState, dict[str, jax.Array]]] = train_step
        self._static: dict[str, Any] = {"config": model.config, "training": self.training}

    def batch(self) -> tuple[Batch, int]:
        """What the next step is trained on, (A, M, T + 1) each, and how many tokens of it are no padding."""
        index = self._order(self.step)
        shape = (self.training.accumulate, -1, self.data.train.tokens_RT.shape[1])
        rows = tuple(jnp.asarray(x.reshape(shape)) for x in self.data.train.take(index))
        return rows, int(self.data.train.count_R[index].sum())

    def compile(self) -> Any:
        """Compiles the step ahead of the first; returns the compiled program, which knows the memory it takes."""
        arguments = (self.model.params, self.state, self.fixed, self.batch()[0])
        compiled = train_step.lower(*arguments, **self._static).compile()
        self._step, self._static = compiled, {}
        return compiled

    def advance(self) -> dict[str, Any]:
        """One step; its loss, gradient norm and learning rate as arrays that may not be there yet, and its tokens."""
        batch, tokens = self.batch()
        self.state, values = self._step(self.model.params, self.state, self.fixed, batch, **self._static)
        self.step += 1
        return values | {"tokens": tokens}

    def evaluate(self) -> float | None:
        """Mean loss over the learned tokens of the evaluation rows, in nats; None where there are none."""
        rows = self.data.evaluation
        return None if rows is None else mean_loss(self.model, rows, self.training, self.adapter())

    def adapter(self) -> Adapter:
        """The adapter as it is now, fitted to the model."""
        return self.start.replace(deltas=whole_deltas(self.model.params, self.state.trained, self.fixed))

    def restore(self, checkpoints: "ocp.CheckpointManager") -> None:
        """Goes on from the newest checkpoint that can be read, if there is one."""
        self.state = restore_newest(checkpoints, self.state)
        self.step = int(self.state.step)


def mean_loss(model: Model, rows: Rows, training: TrainingConfig, adapter: Adapter | None = None) -> float:
    """Mean loss in nats over the learned tokens of rows, with an adapter or without; computed as in training."""
    deltas = None if adapter is None else fit(adapter, model).deltas
    static = {"config": model.config, "training": evaluation_settings(training)}
    size = min(len(rows), max(1, training.batch // training.accumulate))
    total = 0.0
    for start in range(0, len(rows), size):
        tokens, learned, first = rows.take(np.arange(start, start + size) % len(rows))
        learned = learned & (np.arange(start, start + size) < len(rows))[:, None]  # what fills the last batch up
        total += float(evaluate_step(model.params, deltas, (tokens, learned, first), **static))
    return total / max(1, int(rows.learned_RT[:, 1:].sum()))


def evaluation_settings(training: TrainingConfig) -> TrainingConfig:
    """The parts of a config that evaluation depends on, so that other runs use the same compiled program."""
    return TrainingConfig(steps=1, remat=False, dtype=training.dtype)


def train(
    model: Model,
    data: Data,
    training: TrainingConfig,
    *,
    adapter: Adapter,
    seed: int = 0,
    log: Callable[[Mapping[str, Any]], None] | None = None,
) -> Adapter:
    """Trains an adapter on rows in memory, without files: the adapter after the last step, fitted to the model.

    adapter: where it starts, mostly from `lora.init_adapter`; it is not changed. seed: of the order of the rows. log:
    called with the values of each line of metrics, see `run_steps`. Raises AdapterError for an adapter that does not
    fit, RealmError where the loss is no longer finite.
    """
    trainer = Trainer(model, data, training, adapter, seed)
    run_steps(trainer, log=log)
    return trainer.adapter()


def run_steps(
    trainer: Trainer,
    *,
    log: Callable[[Mapping[str, Any]], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    checkpoints: "ocp.CheckpointManager | None" = None,
) -> None:
    """Trains to the last step, from wherever the trainer stands.

    log: every `log_every` steps and after the last, called with step, loss (the mean since the last line),
    learning_rate, gradient_norm (mean), tokens_per_second, seconds, and evaluation_loss where it was due; before the
    first step with step 0 and evaluation_loss. Checkpoints are saved when they are due.
    """
    training, log = trainer.training, log or (lambda values: None)
    if trainer.step == 0 and trainer.data.evaluation is not None:
        log({"step": 0, "evaluation_loss": trainer.evaluate()})
    window, started = [], time.perf_counter()
    while trainer.step < training.steps:
        window.append(trainer.advance())
        step, last = trainer.step, trainer.step == training.steps
        if on_step is not None:
            on_step(step)
        if step % training.log_every and not last:
            continue
        values = {"step": step} | _summary(window, step, started)
        if trainer.data.evaluation is not None and (step % training.evaluate_every == 0 or last):
            values["evaluation_loss"] = trainer.evaluate()
        log(values)
        if checkpoints is not None and (step % training.checkpoint_every == 0 or last):
            save_checkpoint(checkpoints, step, trainer.state)
        window, started = [], time.perf_counter()


def _summary(window: list[dict[str, Any]], step: int, started: float) -> dict[str, float]:
    """What the steps since the last line of metrics come to; waits for the device."""
    loss, norm = (float(np.mean([float(values[name]) for values in window])) for name in ("loss", "gradient_norm"))
    seconds = time.perf_counter() - started
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise RealmError(
            f"step {step}: the loss is {loss} and the norm of its gradient {norm}; "
            "a lower training.learning_rate or a longer warmup would keep them finite"
        )
    return {
        "loss": loss,
        "learning_rate": float(window[-1]["learning_rate"]),
        "gradient_norm": norm,
        "tokens_per_second": sum(values["tokens"] for values in window) / seconds,
        "seconds": seconds,
    }
