"""What a model is, read from GGUF metadata: sizes, rope, and the checks that make them trustworthy.

Called by `model.load` (metadata -> Config) and by `model.export` (Config -> metadata). A `Config` is
hashable and static under `jit`. Key names follow the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); their meaning follows llama.cpp.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from realm_jax.errors import GGUFError
from realm_jax.gguf.types import shown

MAX_LAYERS = 512  # llama.cpp's bound
MAX_SIZE = 1 << 24  # of any width, head count or vocabulary: far above every model there is


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a `general.architecture` name means beyond the hyperparameters in the file.

    rope_halves: rotate (i, i + C/2) pairs (NeoX order) in place of neighbours (2i, 2i + 1).
    rope_full: the rope dimensions must equal the head width.
    """

    rope_halves: bool
    rope_full: bool = True


ARCHITECTURES = {
    "llama": Architecture(rope_halves=False),
    "qwen2": Architecture(rope_halves=True),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) and its context extensions.

    halves: pair order, see `Architecture`. dimensions: rotated channels of a head, even.
    base: theta of the geometric frequency series. scaling: "none", "linear" (Chen et al. 2023),
    "yarn" (Peng et al. 2023) or "longrope" (per-frequency factor tensors). factor: how many times
    the context grew. original_context: tokens before it grew. attn_factor: multiplies sine and cosine.
    """

    dimensions: int
    base: float = 10000.0
    halves: bool = False
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attn_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a transformer. Letters in brackets are the shape suffixes used in the code.

    vocab_size [V], context_length (tokens the model was trained for), layers [L], width [D],
    ffn_width [F], heads [H], kv_heads [K], head_width [C], norm_eps (of RMSNorm).
    """

    architecture: str
    vocab_size: int
    context_length: int
    layers: int
    width: int
    ffn_width: int
    heads: int
    kv_heads: int
    head_width: int
    norm_eps: float
    rope: Rope

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], vocab_size: int, source: str = "metadata") -> "Config":
        """Reads and checks the hyperparameters of a GGUF file.

        vocab_size: rows of the token embedding. source: the file's name, for messages.
        Errors: `GGUFError` names the key that is missing, absurd or at odds with another one.
        """
        read = _Reader(metadata, source)
        name = read.text("general.architecture")
        if name not in ARCHITECTURES:
            raise GGUFError(
                f"{source}: general.architecture is {shown(name)}, which is not supported; "
                f"supported: {', '.join(sorted(ARCHITECTURES))}"
            )
        read.prefix = name + "."
        if read.integer("expert_count", 0, default=0):
            raise read.error("expert_count", "is not 0: mixtures of experts are not supported yet")
        layers = read.integer("block_count", 1, MAX_LAYERS)
        width = read.integer("embedding_length")
        heads = read.per_layer("attention.head_count", layers)
        kv_heads = read.per_layer("attention.head_count_kv", layers, default=heads)
        if heads % kv_heads:
            raise read.error("attention.head_count_kv", f"is {kv_heads}, which does not divide the {heads} heads")
        config = cls(
            architecture=name,
            vocab_size=vocab_size,
            context_length=read.integer("context_length", 1, 1 << 31),
            layers=layers,
            width=width,
            ffn_width=read.per_layer("feed_forward_length", layers),
            heads=heads,
            kv_heads=kv_heads,
            head_width=_head_width(read, width, heads),
            norm_eps=read.number("attention.layer_norm_rms_epsilon", upper=1.0),
            rope=Rope(dimensions=0),
        )
        config = dataclasses.replace(config, rope=_rope(read, config, ARCHITECTURES[name]))
        _check_vocabulary(read, vocab_size)
        return config

    def metadata(self) -> dict[str, Any]:
        """The inverse of `from_metadata`: GGUF keys (without tokenizer) and plain values."""
        sizes = {
            "context_length": self.context_length,
            "block_count": self.layers,
            "embedding_length": self.width,
            "feed_forward_length": self.ffn_width,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head_width,
            "attention.value_length": self.head_width,
            "attention.layer_norm_rms_epsilon": self.norm_eps,
            "rope.dimension_count": self.rope.dimensions,
            "rope.freq_base": self.rope.base,
            "vocab_size": self.vocab_size,
        }
        if self.rope.scaling != "none":
            sizes |= {
                "rope.scaling.type": self.rope.scaling,
                "rope.scaling.factor": self.rope.factor,
                "rope.scaling.original_context_length": self.rope.original_context,
                "rope.scaling.attn_factor": self.rope.attn_factor,
            }
        return {"general.architecture": self.architecture} | {f"{self.architecture}.{k}": v for k, v in sizes.items()}


def _head_width(read: "_Reader", width: int, heads: int) -> int:
    if "attention.key_length" not in read and width % heads:
        raise read.error("attention.head_count", f"is {heads}, which does not divide the width {width}")
    head_width = read.integer("attention.key_length", default=width // heads)
    value_width = read.integer("attention.value_length", default=width // heads)
    if head_width != value_width:
        raise read.error(
            "attention.value_length", f"is {value_width}, but keys have {head_width} channels; both must agree"
        )
    if head_width % 2:
        raise read.error("attention.key_length", f"is {head_width}; rope needs an even head width")
    return head_width


def _rope(read: "_Reader", config: Config, architecture: Architecture) -> Rope:
    dimensions = read.integer("rope.dimension_count", 2, config.head_width, default=config.head_width)
    if dimensions % 2 or (architecture.rope_full and dimensions != config.head_width):
        raise read.error("rope.dimension_count", f"is {dimensions}; it must equal the head width, {config.head_width}")
    factor = read.number("rope.scaling.factor", lower=0.0, default=0.0, closed=True)
    if factor == 0.0:
        factor = read.number("rope.scale_linear", lower=0.0, default=0.0, closed=True)
    scaling = read.text("rope.scaling.type", default="linear")
    if scaling not in ("none", "linear", "yarn", "longrope"):
        raise read.error("rope.scaling.type", f"is {shown(scaling)}; known: none, linear, yarn, longrope")
    if scaling == "linear" and factor in (0.0, 1.0):
        scaling = "none"
    return Rope(
        dimensions=dimensions,
        base=read.number("rope.freq_base", default=10000.0),
        halves=architecture.rope_halves,
        scaling=scaling,
        factor=factor or 1.0,
        original_context=read.integer(
            "rope.scaling.original_context_length", 1, 1 << 31, default=config.context_length
        ),
        attn_factor=read.number("rope.scaling.attn_factor", default=1.0),
    )


def _check_vocabulary(read: "_Reader", rows: int) -> None:
    declared = read.integer("vocab_size", default=rows)
    if declared != rows:
        raise read.error("vocab_size", f"is {declared}, but token_embd.weight has {rows} rows; both must agree")
    tokens = read.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and len(tokens) != rows:
        raise GGUFError(
            f"{read.source}: tokenizer.ggml.tokens has {len(tokens)} tokens, but token_embd.weight has {rows} rows; "
            "both must agree"
        )


class _Reader:
    """Typed, bounded access to metadata; every failure names the file and the key."""

    def __init__(self, metadata: Mapping[str, Any], source: str):
        self.metadata, self.source, self.prefix = metadata, source, ""

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def error(self, key: str, message: str) -> GGUFError:
        return GGUFError(f"{self.source}: {self.prefix}{key} {message}")

    def _get(self, key: str, default: Any, kind: str) -> Any:
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            raise self.error(key, f"is missing; a model needs {kind} here")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default, "a text")
        if not isinstance(value, str):
            raise self.error(key, f"must be a text, not {_describe(value)}")
        return value

    def integer(self, key: str, lower: int = 1, upper: int = MAX_SIZE, default: int | None = None) -> int:
        return self._bounded(key, self._get(key, default, "an integer"), lower, upper)

    def _bounded(self, key: str, value: Any, lower: int, upper: int) -> int:
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise self.error(key, f"must be an integer, not {_describe(value)}")
        if not lower <= value <= upper:
            raise self.error(key, f"is {value}; it must be between {lower} and {upper}")
        return int(value)

    def per_layer(self, key: str, layers: int, default: int | None = None) -> int:
        """One integer, or an array of one a layer that are all the same."""
        value = self._get(key, default, "an integer")
        if not isinstance(value, np.ndarray | list):
            return self._bounded(key, value, 1, MAX_SIZE)
        if len(value) < layers:
            raise self.error(key, f"has {len(value)} entries for {layers} layers")
        sizes = {self._bounded(key, v, 1, MAX_SIZE) for v in value[:layers]}
        if len(sizes) > 1:
            raise self.error(
                key, f"differs between layers ({_describe(sorted(sizes))}); only one value for all is supported"
            )
        return sizes.pop()

    def number(
        self, key: str, lower: float = 0.0, upper: float = math.inf, default: float | None = None, closed: bool = False
    ) -> float:
        """A finite number in (lower, upper), or [lower, upper) where closed."""
        value = self._get(key, default, "a number")
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
            raise self.error(key, f"must be a number, not {_describe(value)}")
        if not math.isfinite(value) or not lower <= value < upper or (value == lower and not closed):
            bound = f"above {lower:g}" if upper == math.inf else f"between {lower:g} and {upper:g}"
            raise self.error(key, f"is {value}; it must be finite and {bound}")
        return float(value)


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
