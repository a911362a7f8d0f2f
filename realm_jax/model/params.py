"""The weights of a model as a pytree that mirrors the architecture, and their names in a GGUF file.

A linear weight is (N, K) = (outputs, inputs): a plain array, or a `QuantizedTensor` still in its ggml
blocks. Layers are a tuple, so formats may differ between layers and a layer can be taken out or
replaced by ordinary tree surgery. `TENSORS` and `LAYER_TENSORS` are the one place that knows how a
weight is called in a file, where it stands in the tree, and which shape it must have.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from realm_jax.model.config import Config
from realm_jax.quant.tensor import QuantizedTensor

Weight = jax.Array | QuantizedTensor


@flax.struct.dataclass
class Attention:
    """norm (D,), q (HC, D), k and v (KC, D), o (D, HC); biases (HC,), (KC,), (KC,), (D,) or None."""

    norm: jax.Array
    q: Weight
    k: Weight
    v: Weight
    o: Weight
    q_bias: jax.Array | None = None
    k_bias: jax.Array | None = None
    v_bias: jax.Array | None = None
    o_bias: jax.Array | None = None


@flax.struct.dataclass
class FeedForward:
    """norm (D,), gate and up (F, D), down (D, F); biases (F,), (F,), (D,) or None."""

    norm: jax.Array
    gate: Weight
    up: Weight
    down: Weight
    gate_bias: jax.Array | None = None
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None


@flax.struct.dataclass
class Layer:
    """One transformer block: attention, then a gated feed-forward network."""

    attn: Attention
    ffn: FeedForward


@flax.struct.dataclass
class Params:
    """embedding (V, D), layers, norm (D,), output (V, D) or None where the embedding serves as output.

    rope_factors (C/2,) or None: what the rope frequencies are divided by (Llama 3.1, longrope).
    """

    embedding: Weight
    layers: tuple[Layer, ...]
    norm: jax.Array
    output: Weight | None = None
    rope_factors: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """name in the file, path in `Params`, shape, and whether a model can do without it."""

    name: str
    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    optional: bool


# name in the file | path in the tree | shape in the letters of `sizes` | optional
TENSORS = (
    ("token_embd.weight", "embedding", "V D", False),
    ("output_norm.weight", "norm", "D", False),
    ("output.weight", "output", "V D", True),
    ("rope_freqs.weight", "rope_factors", "R", True),
    ("rope_factors_long.weight", "rope_factors", "R", True),
    ("rope_factors_short.weight", "rope_factors", "R", True),
)
LAYER_TENSORS = (
    ("attn_norm.weight", "attn.norm", "D", False),
    ("attn_q.weight", "attn.q", "Q D", False),
    ("attn_k.weight", "attn.k", "KV D", False),
    ("attn_v.weight", "attn.v", "KV D", False),
    ("attn_output.weight", "attn.o", "D Q", False),
    ("attn_q.bias", "attn.q_bias", "Q", True),
    ("attn_k.bias", "attn.k_bias", "KV", True),
    ("attn_v.bias", "attn.v_bias", "KV", True),
    ("attn_output.bias", "attn.o_bias", "D", True),
    ("ffn_norm.weight", "ffn.norm", "D", False),
    ("ffn_gate.weight", "ffn.gate", "F D", False),
    ("ffn_up.weight", "ffn.up", "F D", False),
    ("ffn_down.weight", "ffn.down", "D F", False),
    ("ffn_gate.bias", "ffn.gate_bias", "F", True),
    ("ffn_up.bias", "ffn.up_bias", "F", True),
    ("ffn_down.bias", "ffn.down_bias", "D", True),
)


def tensor_specs(config: Config) -> Iterator[TensorSpec]:
    """Every tensor a file of this config may hold."""
    sizes = {
        "V": config.vocab_size,
        "D": config.width,
        "F": config.ffn_width,
        "Q": config.heads * config.head_width,
        "KV": config.kv_heads * config.head_width,
        "R": config.rope.dimensions // 2,
    }

    def spec(prefix: str, root: tuple, name: str, path: str, shape: str, optional: bool) -> TensorSpec:
        return TensorSpec(prefix + name, (*root, *path.split(".")), tuple(sizes[s] for s in shape.split()), optional)

    for row in TENSORS:
        yield spec("", (), *row)
    for i in range(config.layers):
        for row in LAYER_TENSORS:
            yield spec(f"blk.{i}.", ("layers", i), *row)


def build_params(config: Config, weights: dict[tuple[str | int, ...], Any]) -> Params:
    """The tree from its leaves, keyed by path; paths that are absent take their default (None)."""

    def make(cls: type, root: tuple) -> Any:
        names = [f.name for f in dataclasses.fields(cls)]
        return {n: weights[(*root, n)] for n in names if (*root, n) in weights}

    layers = tuple(
        Layer(
            attn=Attention(**make(Attention, ("layers", i, "attn"))),
            ffn=FeedForward(**make(FeedForward, ("layers", i, "ffn"))),
        )
        for i in range(config.layers)
    )
    return Params(layers=layers, **make(Params, ()))


def get_weight(params: Params, path: tuple[str | int, ...]) -> Weight | None:
    """The leaf at a `TensorSpec.path`."""
    node: Any = params
    for step in path:
        node = node[step] if isinstance(step, int) else getattr(node, step)
    return node


def with_arithmetic(params: Params, arithmetic: str) -> Params:
    """The same arrays; packed weights that are multiplied by (layers, the output matrix) have that arithmetic."""
    head = "embedding" if params.output is None else "output"
    layers, own = jax.tree.map(
        lambda w: w.replace(arithmetic=arithmetic) if _is_packed(w) else w,
        (params.layers, getattr(params, head)),
        is_leaf=_is_packed,
    )
    return params.replace(layers=layers, **{head: own})


def arithmetic_of(params: Params) -> str:
    """Of a model: "int8" if any weight that is multiplied by is to be in int8 arithmetic, else "float"."""
    head = params.embedding if params.output is None else params.output
    weights = jax.tree.leaves((params.layers, head), is_leaf=_is_packed)
    return "int8" if any(_is_packed(w) and w.arithmetic != "float" for w in weights) else "float"


def for_any_rows(params: Params) -> Params:
    """The same arrays; those in int8 arithmetic have it for any number of rows: what is measured has one meaning."""
    return jax.tree.map(
        lambda w: w.replace(arithmetic="int8_any_rows") if _is_packed(w) and w.arithmetic == "int8" else w,
        params,
        is_leaf=_is_packed,
    )


def _is_packed(node: Any) -> bool:
    return isinstance(node, QuantizedTensor)


def init_params(config: Config, key: jax.Array, dtype: jnp.dtype = jnp.float32, tied: bool = True) -> Params:
    """Random dense weights to train from: normal with deviation 1 / sqrt(K) for (N, K), vectors of ones.

    Matrices that write to the residual stream (o, down) are scaled down by sqrt(2 L) (GPT-2, Radford et al. 2019).
    tied: the embedding serves as output matrix too.
    """
    weights = {}
    wanted = [s for s in tensor_specs(config) if not s.optional or (s.name == "output.weight" and not tied)]
    for i, spec in enumerate(wanted):
        if len(spec.shape) == 1:
            weights[spec.path] = jnp.ones(spec.shape, dtype)
            continue
        deviation = spec.shape[1] ** -0.5
        if spec.path[-1] in ("o", "down"):
            deviation /= (2 * config.layers) ** 0.5
        weights[spec.path] = deviation * jax.random.normal(jax.random.fold_in(key, i), spec.shape, dtype)
    return build_params(config, weights)
