"""The way from a GGUF file to a model and back.

`load` puts one tensor after another on the device, packed as it stands in the file; `save` writes the
same bytes back; `export` turns freshly trained dense weights into a file.
"""

import functools
import os
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import quant
from realm_jax.compilation import enable_compilation_cache
from realm_jax.errors import GGUFError, RealmError
from realm_jax.gguf.reader import GGUFFile, open_gguf
from realm_jax.gguf.tokenizer import Tokenizer
from realm_jax.gguf.types import Field, ValueType, field, shown
from realm_jax.gguf.writer import write_gguf
from realm_jax.model.config import Config
from realm_jax.model.model import Model, Origin
from realm_jax.model.params import Params, TensorSpec, Weight, build_params, get_weight, tensor_specs
from realm_jax.quant.formats import check_finite
from realm_jax.quant.tensor import QuantizedTensor, load_weight, raw_bytes

# Tables of old converters that follow from the hyperparameters; llama.cpp skips them too.
DERIVED = (".attn_rot_embd.weight", ".rope_freqs.weight", ".attention.rotary_emb.inv_freq")


def bundled(name: str = "tiny.gguf") -> Path:
    """Path of a model that comes with the package: "tiny.gguf" or "tiny-draft.gguf"."""
    return Path(str(resources.files("realm_jax"))) / "assets" / name


def load(path: str | os.PathLike | None = None, *, pre: str | None = None) -> Model:
    """Opens a GGUF file (the first part of a split one; the bundled model where None) as a `Model`.

    pre: the pre-tokenizer to use in place of `tokenizer.ggml.pre`. Weights go to JAX's default device
    one after another; host memory beyond that is about the largest tensor. Errors: `GGUFError`, one
    line that names file, key or tensor, for whatever is broken, contradictory or not supported.
    """
    enable_compilation_cache()
    with open_gguf(bundled() if path is None else path) as file:
        return _load(file, pre)


def _load(file: GGUFFile, pre: str | None) -> Model:
    source = file.path.name
    metadata = file.metadata
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        has = "no tensors (a vocabulary only)" if not file.tensors else "no tensor token_embd.weight"
        raise GGUFError(f"{source}: has {has}; a model needs token_embd.weight, (vocabulary, width)")
    config = Config.from_metadata(metadata, embedding.shape[0], source)
    specs = _check_tensors(file, config)
    has_tokenizer = metadata.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")
    tokenizer = Tokenizer.from_metadata(metadata, pre=pre, source=source) if has_tokenizer else None
    chosen = _rope_factor_tensor(config)
    weights, unused = {}, {}
    for name, info in file.tensors.items():
        spec = specs.get(name)
        if spec is None or (spec.path == ("rope_factors",) and name != chosen):
            unused[name] = (info.format, info.shape, np.array(file.raw(name)))
        else:
            weights[spec.path] = _load_tensor(file, name)
        file.release(name)
    origin = Origin(source, dict(file.fields), tuple(file.tensors), unused, file.alignment)
    return Model(build_params(config, weights), config, tokenizer, origin)


def _rope_factor_tensor(config: Config) -> str:
    if config.rope.scaling != "longrope":
        return "rope_freqs.weight"
    long = config.context_length > config.rope.original_context
    return f"rope_factors_{'long' if long else 'short'}.weight"


def _check_tensors(file: GGUFFile, config: Config) -> dict[str, TensorSpec]:
    """Every tensor is known, has its shape, and none is missing; before anything is loaded."""
    source = file.path.name
    specs = {spec.name: spec for spec in tensor_specs(config)}
    for name, info in file.tensors.items():
        spec = specs.get(name)
        if spec is None and not name.endswith(DERIVED):
            raise GGUFError(
                f"{source}: tensor {shown(name)} has no place in a {config.architecture} model "
                f"of {config.layers} layers"
            )
        if spec is not None and info.shape != spec.shape:
            raise GGUFError(f"{source}: tensor {name} has shape {info.shape}; the hyperparameters make it {spec.shape}")
    missing = [spec.name for spec in specs.values() if not spec.optional and spec.name not in file.tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise GGUFError(f"{source}: tensor {missing[0]}{more} is missing; a {config.architecture} model needs it")
    return specs


def _load_tensor(file: GGUFFile, name: str) -> Weight:
    info, source = file.tensors[name], file.path.name
    raw = file.raw(name)
    try:
        bad = check_finite(raw, info.format)
        if bad is None:
            weight = load_weight(raw, info.format, info.shape)
            return jax.block_until_ready(weight)
    except RealmError as error:
        raise GGUFError(f"{source}: tensor {name}: {error}") from None
    raise GGUFError(
        f"{source}: tensor {name} ({info.format}) is not finite: block {bad} holds NaN or infinity as its scale; "
        "every scale must be finite"
    )


def save(model: Model, path: str | os.PathLike) -> None:
    """Writes a model as GGUF (version 3): tensors that were not changed come out byte for byte.

    A weight that was replaced by one of another format is written in its new format. The file
    appears under its name only when it is complete.
    """
    origin, params = model.origin, model.params
    specs = {spec.name: spec for spec in tensor_specs(model.config)}
    known = [n for n, s in specs.items() if n not in origin.names and get_weight(params, s.path) is not None]
    names = [*origin.names, *(n for n in known if n != "rope_freqs.weight" or not origin.unused)]
    tensors = []
    for name in names:
        if name in origin.unused:
            format, shape, raw = origin.unused[name]
            tensors.append((name, format, shape, functools.partial(_same, raw)))
            continue
        weight = get_weight(params, specs[name].path)
        if weight is not None:
            tensors.append((name, _format_of(weight), tuple(weight.shape), functools.partial(_bytes_of, weight)))
    write_gguf(path, origin.fields, tensors, alignment=origin.alignment)


def _same(raw: np.ndarray) -> np.ndarray:
    return raw


def _format_of(weight: Weight) -> str:
    if isinstance(weight, QuantizedTensor):
        return weight.format
    return {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[str(weight.dtype)]


def _bytes_of(weight: Weight) -> np.ndarray:
    return raw_bytes(weight)[1]


def export(
    path: str | os.PathLike,
    config: Config,
    params: Params,
    tokenizer_fields: Mapping[str, Field],
    choose_format: Callable[[str, tuple[int, ...]], str],
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes dense weights as a new GGUF file.

    choose_format(name, shape) names the format of each matrix ("F32", "Q4_K", ...); vectors stay F32.
    tokenizer_fields: the `tokenizer.*` metadata. about: further metadata, plain values.
    """
    signed = ("rope.scaling.factor", "epsilon", "freq_base", "attn_factor")
    fields = {}
    for key, value in (config.metadata() | dict(about or {})).items():
        as_float = key.endswith(signed) or isinstance(value, float)
        fields[key] = Field(ValueType.FLOAT32, float(value)) if as_float else field(value)
    tensors = []
    for spec in tensor_specs(config):
        weight = get_weight(params, spec.path)
        if weight is None or spec.name.startswith("rope_factors"):
            continue
        format = choose_format(spec.name, spec.shape) if len(spec.shape) > 1 else "F32"
        produce = functools.partial(_encode, weight, format)
        tensors.append((spec.name, format, spec.shape, produce))
    write_gguf(path, fields | dict(tokenizer_fields), tensors)


def _encode(weight: jax.Array, format: str) -> np.ndarray:
    return raw_bytes(quant.quantize(jnp.asarray(weight, jnp.float32), format))[1]
