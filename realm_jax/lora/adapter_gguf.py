"""Adapters in llama.cpp's form: a GGUF file of type "adapter". Called by `lora.files`.

Source: `llama-adapter.cpp` and `convert_lora_to_gguf.py` of llama.cpp (https://github.com/ggml-org/llama.cpp).

Shape suffixes: `N` output features, `K` input features, `R` rank, `V` vocabulary, `D` width.
"""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax.numpy as jnp
import numpy as np

from realm_jax import quant
from realm_jax.errors import AdapterError, GGUFError, RealmError
from realm_jax.gguf.reader import GGUFFile, open_gguf
from realm_jax.gguf.types import Field, ValueType, field, shown, shown_path
from realm_jax.gguf.writer import write_gguf
from realm_jax.kernels.delta import Delta
from realm_jax.lora.adapter import Adapter, Path, build_deltas, delta_paths
from realm_jax.lora.misfit import gguf_name
from realm_jax.lora.scales import gguf_alpha, gguf_factor
from realm_jax.model.config import MAX_LAYERS, MAX_SIZE

ALPHA, ALORA = "adapter.lora.alpha", "adapter.alora.invocation_tokens"
BASE_NAME = "general.base_model.0.name"


@functools.cache
def _paths() -> dict[str, Path]:
    """Every weight that a delta can change, by its name in the file."""
    return {gguf_name(path): path for path in delta_paths(MAX_LAYERS)}


def read_adapter_gguf(path: FilePath, strict: bool, skip: Callable[[str], None]) -> Adapter:
    """The adapter in a file, in the row order of GGUF. skip: told what a load that is not strict leaves out."""
    try:
        with open_gguf(path) as file:
            return _read(file, strict, skip)
    except GGUFError as error:
        raise AdapterError(str(error)) from None


def _read(file: GGUFFile, strict: bool, skip: Callable[[str], None]) -> Adapter:
    metadata = file.metadata
    _check_kind(file.path, metadata)
    alpha = metadata.get(ALPHA, 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= 1e30:
        raise _error(file.path, f"{ALPHA} is {shown(str(alpha))}; want a finite number")
    pairs: dict[Path, dict[str, np.ndarray]] = {}
    for name in file.tensors:
        match = re.fullmatch(r"(.*)\.lora_([ab])", name)
        if match and match[1] in _paths():
            pairs.setdefault(_paths()[match[1]], {})[match[2]] = _values(file, name)
            continue
        norm = ": it replaces a norm, which llama.cpp ignores" if name.endswith("_norm.weight") else ""
        wrong = f"tensor {shown(name)} is no low-rank part of a weight that an adapter can change{norm}"
        if strict:
            raise _error(file.path, wrong)
        skip(wrong)
    if not pairs:
        raise _error(file.path, "has no pair lora_a, lora_b of a weight that an adapter can change")
    deltas = {place: _delta(file.path, place, pair, alpha) for place, pair in pairs.items()}
    layers = max((place[1] + 1 for place in deltas if len(place) > 1), default=0)
    base = metadata.get(BASE_NAME)
    return Adapter(
        build_deltas(deltas, layers),
        source=file.path.name,
        architecture=metadata["general.architecture"],
        row_order="ggml",
        heads=_heads(metadata),
        base=base if isinstance(base, str) else None,
    )


def _check_kind(path: FilePath, metadata: Mapping[str, Any]) -> None:
    for key, want in (("general.type", "adapter"), ("adapter.type", "lora")):
        if metadata.get(key) != want:
            found = f"is {shown(str(metadata[key]))}" if key in metadata else "is missing"
            hint = "; is this a model?" if key == "general.type" and metadata.get(key, "model") == "model" else ""
            raise _error(path, f"{key} {found}; in a LoRA adapter it is {want!r}{hint}")
    if not isinstance(metadata.get("general.architecture"), str):
        raise _error(path, "general.architecture is missing or no text; want that of the base model, as in 'llama'")
    if ALORA in metadata:
        raise _error(path, f"{ALORA} is set: activated LoRA, which acts after certain tokens only, is not supported")


def _heads(metadata: Mapping[str, Any]) -> tuple[int, int] | None:
    prefix = f"{metadata['general.architecture']}.attention.head_count"
    heads = metadata.get(prefix)
    kv_heads = metadata.get(f"{prefix}_kv", heads)
    fine = all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= MAX_SIZE for n in (heads, kv_heads))
    return (heads, kv_heads) if fine else None


def _values(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor in float32, dequantized where it is in blocks. Checked for values that are none."""
    info = file.tensors[name]
    if len(info.shape) != 2:
        raise _error(file.path, f"tensor {shown(name)} has shape {info.shape}; want two dimensions")
    try:
        values = np.asarray(quant.dequantize(file.raw(name), info.format, info.shape))
    except RealmError as error:
        raise _error(file.path, f"tensor {shown(name)}: {error}") from None
    if not np.isfinite(values).all():
        raise _error(file.path, f"tensor {shown(name)} has a value that is NaN or infinite; every value must be finite")
    return values


def _delta(path: FilePath, place: Path, pair: dict[str, np.ndarray], alpha: float) -> Delta:
    name = gguf_name(place)
    for part in "ab":
        if part not in pair:
            raise _error(path, f"tensor {name}.lora_{part} is missing; its other half is there")
    a, b = pair["a"], pair["b"]
    if place == ("embedding",):
        a, b = b.T, a  # lora_a (V, R) is looked up by token, lora_b (D, R) leads to the width
    if a.shape[0] != b.shape[1]:
        raise _error(path, f"tensor {name}: lora_a {pair['a'].shape} and lora_b {pair['b'].shape} differ in their rank")
    scale = np.float32(alpha) / np.float32(a.shape[0]) if alpha else np.float32(1)
    return Delta(jnp.asarray(a), jnp.asarray(b), jnp.float32(scale))


def write_adapter_gguf(adapter: Adapter, path: FilePath, dtype: np.dtype, cast: Callable[..., np.ndarray]) -> None:
    """Writes a file. adapter: of a known architecture, in the row order of GGUF, without DoRA.

    cast(path, what, values, dtype): the array to write, or an AdapterError.
    """
    alpha = common_alpha(adapter)
    fields = {
        "general.architecture": field(adapter.architecture),
        "general.type": field("adapter"),
        "adapter.type": field("lora"),
        ALPHA: Field(ValueType.FLOAT32, alpha),
    }
    if adapter.heads is not None:
        for key, count in zip(("head_count", "head_count_kv"), adapter.heads, strict=True):
            fields[f"{adapter.architecture}.attention.{key}"] = field(count)
    if adapter.base is not None:
        fields |= {"general.base_model.count": field(1), BASE_NAME: field(adapter.base)}
    tensors = []
    for place, delta in adapter.items():
        factor = gguf_factor(alpha, float(delta.scale), delta.rank)
        a, b = (delta.b, delta.a.T) if place == ("embedding",) else (delta.a, delta.b)
        for part, values in (("lora_a", a), ("lora_b", b if factor == 1 else np.asarray(b, np.float64) * factor)):
            array = cast(place, part, values, dtype)
            name, raw = quant.raw_bytes(array)
            tensors.append((f"{gguf_name(place)}.{part}", name, array.shape, functools.partial(lambda raw: raw, raw)))
    write_gguf(path, fields, tensors)


def common_alpha(adapter: Adapter) -> float:
    """The one alpha of an adapter's file, whatever the scales of its weights: that of most of them."""
    return gguf_alpha([(float(delta.scale), delta.rank) for _, delta in adapter.items()])


def _error(path: FilePath, message: str) -> AdapterError:
    return AdapterError(f"{shown_path(path)}: {message}")
