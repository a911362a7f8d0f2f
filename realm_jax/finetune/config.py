"""What `realm finetune` is told: one frozen dataclass, read from a TOML file by `realm_jax.experiment.load_config`."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from realm_jax.errors import RealmError


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter to train; rank, alpha, targets, rslora and dora are those of `lora.init_adapter`.

    start: path of an adapter (PEFT directory or GGUF) to go on from, to which the other keys do not apply; "" for none.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    rslora: bool = False
    dora: bool = False
    start: str = ""


@dataclass(frozen=True)
class DataConfig:
    """What to learn from, and how it is laid in rows.

    train: a JSONL file or a text. evaluation: the same, never trained on; where it is "", that share of the training
    documents is set aside (0: none, and no evaluation). format: "auto" goes by the suffix, .jsonl is JSONL, anything
    else text. separator: what stands between the documents of a text file; "": the whole file is one document.
    row_tokens: tokens a row; a longer document is cut. pack: documents share rows, each seeing only itself; false: one
    document a row.
    """

    train: str
    evaluation: str = ""
    evaluation_share: float = 0.05
    format: Literal["auto", "jsonl", "text"] = "auto"
    separator: str = ""
    row_tokens: int = 512
    pack: bool = True

    def __post_init__(self):
        if not 0 <= self.evaluation_share < 1:
            raise RealmError(f"data.evaluation_share is {self.evaluation_share}; want a share from 0 to less than 1")
        if self.row_tokens < 1:
            raise RealmError(f"data.row_tokens is {self.row_tokens}; want at least 1")


@dataclass(frozen=True)
class TrainingConfig:
    """How the adapter is trained. Exactly one of steps and epochs (passes over the rows) says how long.

    batch: rows a step, in `accumulate` parts, one after another (their gradients add up). learning_rate: its peak, to
    which a linear rise over `warmup` steps leads; from there `schedule` leads to 0, or stays. weight_decay: of a and b.
    clip: largest norm of the gradient, 0 for no limit. remat: activations inside a layer are computed again rather than
    kept. dtype: of the activations; adapter and optimizer are always float32. log_every, in steps, divides
    evaluate_every and checkpoint_every.
    """

    steps: int | None = None
    epochs: float | None = None
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = 10
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: Literal["adamw", "lion", "sgd"] = "adamw"
    remat: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    evaluate_every: int = 100
    checkpoint_every: int = 100
    log_every: int = 10

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise RealmError("training.steps and training.epochs: give one of them, and not both")
        for name in ("steps", "epochs", "batch", "accumulate", "evaluate_every", "checkpoint_every", "log_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RealmError(f"training.{name} is {value}; want more than 0")
        for name in ("learning_rate", "warmup", "weight_decay", "clip"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise RealmError(f"training.{name} is {value}; want 0 or more")
        if self.batch % self.accumulate:
            raise RealmError(f"training.batch is {self.batch} rows; want a multiple of accumulate, {self.accumulate}")
        for name in ("evaluate_every", "checkpoint_every"):
            if getattr(self, name) % self.log_every:
                raise RealmError(
                    f"training.{name} is {getattr(self, name)}; want a multiple of log_every, {self.log_every}"
                )

    def with_steps(self, rows: int) -> "TrainingConfig":
        """The same with `steps` said in place of `epochs`, for so many rows. RealmError for a longer warm-up."""
        steps = self.steps or math.ceil(self.epochs * rows / self.batch)
        if self.warmup >= steps:
            raise RealmError(f"training.warmup is {self.warmup} steps; want fewer than the {steps} steps of training")
        return dataclasses.replace(self, steps=steps, epochs=None)


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides an adapter. model: a GGUF file, "" for the bundled one. seed: of the adapter's start, the
    order of the rows, and what is set aside for evaluation. Paths are looked for from the current directory, then from
    the folder of the config file.
    """

    data: DataConfig
    training: TrainingConfig
    model: str = ""
    seed: int = 0
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise RealmError(f"seed is {self.seed}; want 0 to 2 ** 63 - 1")
