"""An adapter: a tree of deltas with the same paths as the weights that they change, and how it comes to fit a model.

`Adapter.deltas` is a `Params` whose leaves are `Delta`s or None, so `adapter.deltas.layers[0].attn.q` stands beside
`model.params.layers[0].attn.q`. Files (`lora.files`) and training (`realm_jax.finetune`) make adapters; `fit` checks
one against a model; the forward pass takes the fitted tree.

Shape suffixes: `N` output features, `K` input features, `R` rank, `A` adapters of a stack, `B` batch rows.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from realm_jax.errors import AdapterError
from realm_jax.gguf.types import shown
from realm_jax.kernels.delta import Delta, dora_norms
from realm_jax.kernels.residency import packed_until
from realm_jax.lora.misfit import Path as Path
from realm_jax.lora.misfit import misfit
from realm_jax.lora.row_order import to_ggml_rows
from realm_jax.model.config import ARCHITECTURES, Config
from realm_jax.model.model import Model
from realm_jax.model.params import Attention, FeedForward, Layer, Params, TensorSpec, get_weight, tensor_specs

logger = logging.getLogger("realm_jax")

TARGETS = ("q", "k", "v", "o", "gate", "up", "down", "embedding", "output")
"""The weights that a delta can change, by the last step of their path."""


@flax.struct.dataclass
class Adapter:
    """Deltas beside the weights of a model. Arrays are leaves; what is below them is static.

    deltas: `Params` of `Delta`s; None where a weight stays as it is. Of one adapter a (R, K), b (N, R); of a stack (see
    `lora.stack`) each with a leading axis (A,). source: the file's name, for messages. architecture: that of its base
    (`general.architecture`), None where the file does not say. row_order: how the output rows of q and k
    are ordered: "hf", as Hugging Face has them, or "ggml", as in GGUF files (the same for models that rotate halves).
    heads: query and kv heads of its base, which lead from one order to the other; None where they are not known.
    base: name or path of its base model, as its file gives it; None where it gives none. fitted: `fit` has checked it
    against a model. skipped: what a lenient `fit` or load left out, one line each.
    """

    deltas: Params
    source: str = flax.struct.field(pytree_node=False, default="adapter")
    architecture: str | None = flax.struct.field(pytree_node=False, default=None)
    row_order: str = flax.struct.field(pytree_node=False, default="ggml")
    heads: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)
    base: str | None = flax.struct.field(pytree_node=False, default=None)
    fitted: bool = flax.struct.field(pytree_node=False, default=False)
    skipped: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

    def items(self) -> Iterator[tuple[Path, Delta]]:
        """Path and delta of every weight that the adapter changes, in the order of the model."""
        for path in delta_paths(len(self.deltas.layers)):
            delta = get_weight(self.deltas, path)
            if delta is not None:
                yield path, delta

    def scaled(self, factor: float | jax.Array) -> "Adapter":
        """The adapter with every scale multiplied by a factor; the scale is an array, so nothing is compiled anew."""
        return self.map(lambda delta: delta.replace(scale=delta.scale * jnp.asarray(factor, jnp.float32)))

    def map(self, change: Any) -> "Adapter":
        """The adapter with `change(delta)` in place of every delta."""
        return self.replace(deltas=map_deltas(change, self.deltas))

    @property
    def rank(self) -> int:
        """The largest rank of its deltas."""
        return max((delta.rank for _, delta in self.items()), default=0)

    @property
    def stacked(self) -> bool:
        """Whether this is a stack of adapters, of which each batch row takes one."""
        return any(delta.a.ndim == 3 for _, delta in self.items())

    @property
    def size(self) -> int:
        """How many numbers it has (a, b and magnitudes)."""
        parts = ((d.a, d.b, d.magnitude) for _, d in self.items())
        return sum(math.prod(x.shape) for triple in parts for x in triple if x is not None)

    def __repr__(self) -> str:
        found = list(self.items())
        names = sorted({str(path[-1]) for path, _ in found}, key=TARGETS.index)
        kind = "DoRA" if any(delta.magnitude is not None for _, delta in found) else "LoRA"
        return f"Adapter({self.source}: {kind}, rank {self.rank}, {len(found)} weights: {', '.join(names)})"


def map_deltas(change: Any, deltas: Params) -> Params:
    """The tree with `change(delta)` in place of every delta."""
    return jax.tree.map(change, deltas, is_leaf=lambda node: isinstance(node, Delta))


def delta_paths(layers: int) -> Iterator[Path]:
    """Paths of all weights of a model of so many layers that a delta can change, in the order of the model."""
    yield ("embedding",)
    for i in range(layers):
        for part, names in (("attn", "qkvo"), ("ffn", ("gate", "up", "down"))):
            for name in names:
                yield ("layers", i, part, name)
    yield ("output",)


def build_deltas(by_path: Mapping[Path, Any], layers: int) -> Params:
    """The tree of deltas from its leaves; paths that are absent are None. layers: of the model, or what is known."""

    def block(cls: type, i: int, part: str) -> Any:
        names = [f.name for f in dataclasses.fields(cls)]
        return cls(**{name: by_path.get(("layers", i, part, name)) for name in names})

    return Params(
        embedding=by_path.get(("embedding",)),
        layers=tuple(Layer(block(Attention, i, "attn"), block(FeedForward, i, "ffn")) for i in range(layers)),
        norm=None,
        output=by_path.get(("output",)),
    )


def fit(adapter: Adapter, model: Model, *, strict: bool = True) -> Adapter:
    """The adapter, checked against a model and brought into the order of its weights: ready for the forward pass.

    One that is fitted already is checked again for its shapes only. Where `strict` is false, what does not fit is left
    out, and `skipped` says so, a line each. Raises AdapterError, one line that names file and tensor: for another
    architecture (always), a weight the model does not have, a shape, a rank or numbers that cannot be.
    """
    config = model.config
    checked = check(adapter, config, model.origin.source, strict=strict)
    deltas = checked.deltas
    if not adapter.fitted:
        placed = {path: _in_place(adapter, model, path, delta) for path, delta in checked.items()}
        deltas = build_deltas(placed, config.layers)
    return checked.replace(
        deltas=deltas,
        architecture=config.architecture,
        row_order="ggml",
        heads=(config.heads, config.kv_heads),
        fitted=True,
    )


def check(adapter: Adapter, config: Config, base: str = "its base model", *, strict: bool = True) -> Adapter:
    """The adapter, checked against the config of a base model called `base`: what `fit` can say without its weights.

    The deltas stay as they are. Where `strict` is false, those that do not fit are left out; `skipped` and the logger
    "realm_jax" (as warnings) say which and why. Raises AdapterError as `fit` does.
    """
    if adapter.architecture not in (None, config.architecture):
        raise AdapterError(
            f"{adapter.source}: is made for {shown(adapter.architecture)} models; {base} is {config.architecture}"
        )
    targets = target_specs(config)
    fitting, skipped = {}, []
    for path, delta in adapter.items():
        wrong = misfit(delta, path, targets, check_values=not adapter.fitted)
        if wrong is None:
            fitting[path] = delta
        elif strict:
            raise AdapterError(f"{adapter.source}: {wrong}")
        else:
            skipped.append(wrong)
            logger.warning("%s: left out: %s", adapter.source, wrong)
    deltas = build_deltas(fitting, config.layers)
    return adapter.replace(deltas=deltas, skipped=(*adapter.skipped, *skipped))


def target_specs(config: Config) -> dict[Path, TensorSpec]:
    """The weights of a model of this config that a delta can change, by path; the output head too where it is tied."""
    wanted = set(delta_paths(config.layers))
    return {spec.path: spec for spec in tensor_specs(config) if spec.path in wanted}


def path_name(path: Path) -> str:
    """A path as people write it: layers.0.attn.q."""
    return ".".join(map(str, path))


def weight_of(params: Params, path: Path) -> Any:
    """The weight that a delta at this path changes: the embedding, for the output head of a tied model."""
    weight = get_weight(params, path)
    return params.embedding if weight is None and path == ("output",) else weight


def _in_place(adapter: Adapter, model: Model, path: Path, delta: Delta) -> Delta:
    """The delta in the row order of GGUF files, with the norms that a DoRA delta needs."""
    config = model.config
    if adapter.row_order == "hf" and not ARCHITECTURES[config.architecture].rope_halves and path[-1] in ("q", "k"):
        delta = to_ggml_rows(delta, config.heads if path[-1] == "q" else config.kv_heads)
    return with_norms(delta, weight_of(model.params, path), path)


def with_norms(delta: Delta, weight: Any, path: Path, *, same_weight: bool = False) -> Delta:
    """The delta with its norms computed for this weight, where it has a magnitude; else as it is."""
    if delta.magnitude is None:
        return delta
    squared_N = delta.norms[0] if same_weight else None
    norms = dora_norms(weight, delta, embedding=path == ("embedding",), squared_N=squared_N)
    return delta.replace(norms=jax.lax.stop_gradient(norms))


def refresh_norms(deltas: Params, params: Params, *, same_weights: bool = False) -> Params:
    """The tree with the norms of its DoRA deltas computed anew: after a, b or the weights have changed.

    same_weights: the deltas have norms already, and only a and b have changed since.
    """
    fresh, previous = {}, None
    for path in delta_paths(len(deltas.layers)):
        delta = get_weight(deltas, path)
        if delta is not None:
            if previous is not None:  # one weight after another, so that they are not all dequantized at once
                _, delta = packed_until(previous, delta)
            fresh[path] = with_norms(delta, weight_of(params, path), path, same_weight=same_weights)
            previous = fresh[path].norms
    return build_deltas(fresh, len(deltas.layers))


def init_adapter(
    model: Model,
    key: jax.Array,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    targets: Sequence[str] = ("q", "k", "v", "o", "gate", "up", "down"),
    rslora: bool = False,
    dora: bool = False,
) -> Adapter:
    """An adapter to train, fitted to the model, that changes nothing yet: a is random, b zero (float32).

    a is uniform within 1 / sqrt(K), as PEFT has it. alpha: the scale is alpha / rank, or alpha / sqrt(rank) if
    `rslora` (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732). targets: of TARGETS. dora: magnitudes too, which
    begin at the lengths of the weights. AdapterError for a rank below 1, an alpha that is not finite, unknown targets.
    """
    if rank < 1 or not math.isfinite(alpha):
        raise AdapterError(f"rank is {rank} and alpha {alpha}; want a rank of at least 1 and a finite alpha")
    for target in targets:
        if target not in TARGETS:
            raise AdapterError(f"target {shown(target)} is not known; targets are {', '.join(TARGETS)}")
    scale = jnp.float32(alpha / (math.sqrt(rank) if rslora else rank))
    deltas = {}
    for i, (path, spec) in enumerate(target_specs(model.config).items()):
        if path[-1] not in targets:
            continue
        N, K = spec.shape
        a = jax.random.uniform(jax.random.fold_in(key, i), (rank, K), jnp.float32, -(K**-0.5), K**-0.5)
        delta = Delta(a, jnp.zeros((N, rank), jnp.float32), scale)
        if dora:
            embedding = path == ("embedding",)
            norms = dora_norms(weight_of(model.params, path), delta, embedding=embedding)
            delta = delta.replace(magnitude=jnp.sqrt(norms[0]), norms=norms)
        deltas[path] = delta
    config = model.config
    return Adapter(
        build_deltas(deltas, config.layers),
        architecture=config.architecture,
        heads=(config.heads, config.kv_heads),
        fitted=True,
    )
