"""Trains the two models that come with the package, from generated text to GGUF files.

    python experiments/train_tiny.py [CONFIG] [--set KEY=VALUE ...] [--name NAME] [--resume]

Both models see the same text and share one vocabulary. A run that was killed goes on with `--resume` from its
last checkpoint, and ends with the very weights of a run that was not. `tiny_report.py` measures the result and
writes the card.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from realm_jax.errors import RealmError
from realm_jax.experiment import Run, experiment_command, plot_curves
from realm_jax.experiment.checkpoints import open_checkpoints, progress_bar, restore_newest, save_checkpoint
from realm_jax.model import Config, Params, Rope, export, init_params, unembed
from realm_jax.model import run as run_model
from tiny_corpus import Corpus, TextConfig, make_corpus
from tiny_report import write_report

ROLES = ("target", "draft")
_LICENSE = "apache-2.0"
_FILE_TYPE_MOSTLY_Q4_K_M, _QUANTIZATION_VERSION = 15, 2


@dataclass(frozen=True)
class ModelConfig:
    """One model: where it goes and how large it is. See `realm_jax.model.Config` for the sizes."""

    file: str
    name: str
    description: str
    context_length: int
    layers: int
    width: int
    ffn_width: int
    heads: int
    kv_heads: int
    head_width: int

    def sizes(self, vocabulary: int) -> Config:
        return Config(
            architecture="llama",
            vocab_size=vocabulary,
            context_length=self.context_length,
            layers=self.layers,
            width=self.width,
            ffn_width=self.ffn_width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_width=self.head_width,
            norm_eps=float(np.float32(1e-5)),  # as the file will hold it
            rope=Rope(dimensions=self.head_width, original_context=self.context_length),
        )


@dataclass(frozen=True)
class TrainingConfig:
    """AdamW with a linear warm-up and a cosine decay to zero; weight decay on matrices alone.

    batch: rows a step. steps_per_call: steps that run on the device between two looks of the host, which
    divides all other counts of steps.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int
    weight_decay: float
    clip: float
    steps_per_call: int
    evaluate_every: int
    checkpoint_every: int

    def __post_init__(self):
        for name in ("steps", "evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            if value <= 0 or self.steps_per_call <= 0 or value % self.steps_per_call:
                raise RealmError(f"{name} is {value}; want a multiple of steps_per_call, {self.steps_per_call}")
        if not 0 <= self.warmup < self.steps:
            raise RealmError(f"warmup is {self.warmup} steps; want fewer than the {self.steps} steps of training")


@dataclass(frozen=True)
class TrainTinyConfig:
    """Everything that decides the shipped files. formats: ggml format by tensor name pattern, first match wins."""

    seed: int
    text: TextConfig
    target: ModelConfig
    draft: ModelConfig
    target_training: TrainingConfig
    draft_training: TrainingConfig
    formats: dict[str, str]


@flax.struct.dataclass
class TrainState:
    """params: dense float32 weights. optimizer: optax state. step: int32 scalar, steps done and place in the data."""

    params: Params
    optimizer: optax.OptState
    step: jax.Array


def main(config: TrainTinyConfig, run: Run) -> None:
    """Train the bundled target and draft models, export them as GGUF, and measure them."""
    console = Console(stderr=True)
    corpus = make_corpus(config.text, config.seed)
    console.print(
        f"text: {corpus.train_RT.size:,} tokens in {len(corpus.train_RT):,} rows; run directory: {run.folder}"
    )
    for role in ROLES:
        training = getattr(config, f"{role}_training")
        sizes = getattr(config, role).sizes(config.text.vocabulary)
        params = train(role, sizes, training, corpus, config.seed, run, console)
        export_model(run.folder, getattr(config, role), sizes, params, corpus, config.formats)
    plot_losses(run)
    write_report(run, corpus, {role: getattr(config, role).file for role in ROLES}, console)


# --- training ------------------------------------------------------------------------------------------------


def make_optimizer(training: TrainingConfig) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, training.learning_rate, training.warmup, training.steps)
    matrices = functools.partial(jax.tree.map, lambda weight: weight.ndim > 1)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=training.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(training.clip), adamw)


def loss(params: Params, sizes: Config, rows_BT: jax.Array) -> jax.Array:
    """Mean cross-entropy (nats a token) of rows (B, T + 1): every token after the first from those before it."""
    hidden_BTD, _ = run_model(params, sizes, rows_BT[:, :-1])
    logits_BTV = unembed(params, sizes, hidden_BTD)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, rows_BT[:, 1:]).mean()


@functools.partial(jax.jit, static_argnames=("sizes", "training"), donate_argnames="state")
def train_steps(
    state: TrainState, data_RT: jax.Array, key: jax.Array, sizes: Config, training: TrainingConfig
) -> tuple[TrainState, jax.Array]:
    """`steps_per_call` steps on rows drawn by `fold_in(key, step)`: the new state, and the mean loss of these steps."""
    optimizer = make_optimizer(training)

    def one(state: TrainState, _) -> tuple[TrainState, jax.Array]:
        index_B = jax.random.randint(jax.random.fold_in(key, state.step), (training.batch,), 0, data_RT.shape[0])
        value, gradient = jax.value_and_grad(loss)(state.params, sizes, data_RT[index_B])
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        return TrainState(optax.apply_updates(state.params, updates), moments, state.step + 1), value

    state, losses = jax.lax.scan(one, state, length=training.steps_per_call)
    return state, losses.mean()


@functools.partial(jax.jit, static_argnames=("sizes", "batch"))
def mean_loss(params: Params, data_RT: jax.Array, sizes: Config, batch: int) -> jax.Array:
    """Loss over all rows, `batch` at a time; rows that do not fill a batch are left out."""
    batch = min(batch, len(data_RT))
    count = len(data_RT) // batch
    batches = data_RT[: count * batch].reshape(count, batch, -1)
    return jax.lax.map(lambda rows_BT: loss(params, sizes, rows_BT), batches).mean()


def train(
    role: str, sizes: Config, training: TrainingConfig, corpus: Corpus, seed: int, run: Run, console: Console
) -> Params:
    """Trains one model to its last step, from its newest checkpoint where the run has one."""
    init_key, data_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), ROLES.index(role)))
    params = init_params(sizes, init_key)
    state = TrainState(params, make_optimizer(training).init(params), jnp.zeros((), jnp.int32))
    train_RT, held_out_RT = jnp.asarray(corpus.train_RT), jnp.asarray(corpus.held_out_RT)
    with open_checkpoints(run.folder / "checkpoints" / role) as checkpoints, progress_bar(console) as progress:
        state = restore_newest(checkpoints, state)
        step = int(state.step)
        run.keep_metrics(lambda line: line["model"] != role or line["step"] <= step)
        task = progress.add_task(role, total=training.steps, completed=step, loss="")
        while step < training.steps:
            start = time.perf_counter()
            state, train_loss = train_steps(state, train_RT, data_key, sizes, training)
            step += training.steps_per_call
            values = {"loss": float(train_loss), "seconds": time.perf_counter() - start}
            if step % training.evaluate_every == 0 or step == training.steps:
                values["held_out_loss"] = float(mean_loss(state.params, held_out_RT, sizes, training.batch))
                console.print(f"{role} step {step}: loss {values['loss']:.4f}, held out {values['held_out_loss']:.4f}")
            run.log(model=role, step=step, **values)
            if step % training.checkpoint_every == 0 or step == training.steps:
                save_checkpoint(checkpoints, step, state)
            progress.update(task, completed=step, loss=f"loss {values['loss']:.3f}")
    return state.params


# --- results -------------------------------------------------------------------------------------------------


def export_model(
    folder: Path, model: ModelConfig, sizes: Config, params: Params, corpus: Corpus, formats: dict[str, str]
) -> None:
    about = {
        "general.name": model.name,
        "general.description": model.description,
        "general.license": _LICENSE,
        "general.file_type": _FILE_TYPE_MOSTLY_Q4_K_M,
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    choose = functools.partial(choose_format, formats)
    export(folder / model.file, sizes, params, corpus.vocabulary.gguf_fields(), choose, about)


def choose_format(formats: dict[str, str], name: str, shape: tuple[int, ...]) -> str:
    """The ggml format of the first pattern that matches the tensor's name. Raises RealmError where none does."""
    for pattern, format in formats.items():
        if fnmatchcase(name, pattern):
            return format
    raise RealmError(f'formats: no pattern matches the tensor {name!r}; end the table with "*" = "Q4_K"')


def plot_losses(run: Run) -> None:
    lines = run.metrics()
    curves = {}
    for role in ROLES:
        for key, label in (("loss", "training text"), ("held_out_loss", "held-out stories")):
            points = [(line["step"], line[key]) for line in lines if line["model"] == role and key in line]
            curves[f"{role}, {label}"] = tuple(zip(*points, strict=True))
    plot_curves(run.folder / "loss.png", curves, title="Bundled models", y_label="loss (nats a token)", log_y=True)


command = experiment_command(main, TrainTinyConfig, Path(__file__).parents[1] / "configs" / "train_tiny.toml")

if __name__ == "__main__":
    # On a GPU, scatter-adds and autotuned matmuls differ from run to run unless told not to.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    command()
