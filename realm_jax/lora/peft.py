"""Adapters in Hugging Face PEFT's form: a directory of adapter_config.json and adapter_model.safetensors.

Called by `lora.files`, which says what is done about order and scales. Source of names and layouts: PEFT
(https://github.com/huggingface/peft, `utils/save_and_load.py` and `tuners/lora`).

Shape suffixes: `N` output features, `K` input features, `R` rank, `V` vocabulary, `D` width.
"""

import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from realm_jax.errors import AdapterError
from realm_jax.gguf.types import shown, shown_path
from realm_jax.kernels.delta import Delta
from realm_jax.lora.adapter import Adapter, Path, build_deltas
from realm_jax.lora.peft_config import PeftConfig, read_config
from realm_jax.lora.scales import peft_alpha

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "embedding": "embed_tokens",
    "output": "lm_head",
}
PARTS = {name: ("attn" if module.startswith("self_attn") else "ffn", name) for name, module in MODULES.items()}
TARGET_OF = {module: name for name, module in MODULES.items()}
# base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight; without prefixes, or with an adapter's name
_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?(?:layers\.(?P<layer>0|[1-9][0-9]{0,2})\.)?"
    rf"(?P<target>{'|'.join(map(re.escape, TARGET_OF))})"
    r"\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.(?!bias$)[^.]+?)??(?:\.weight)?"
)
# PEFT saves the whole weights of embeddings that an adapter is for beside it: copies of what the base model has.
_COPY = re.compile(r"(?:base_model\.model\.)?(?:model\.)?(?:embed_tokens|lm_head)\.base_layer\.weight")
_DTYPES = ("F32", "F16", "BF16", "F64")
_DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Found = dict[str, tuple[str, np.ndarray]]  # kind of tensor -> its key in the file and its values


def read_peft(folder: FilePath, strict: bool, skip: Callable[[str], None]) -> Adapter:
    """The adapter in a directory, in Hugging Face's row order. skip: told what a load that is not strict leaves out."""
    config = read_config(folder / CONFIG)
    path = _weights_path(folder)
    extra = [f"{CONFIG}: {key} is set, which is not supported" for key in config.additions]
    by_place: dict[Path, Found] = {}
    with _opened(path) as file:
        for key in sorted(file.keys()):
            match = _TENSOR.fullmatch(key)
            place = match and _place(match)
            if place:
                found = by_place.setdefault(place, {})
                if match["kind"] in found:
                    other = found[match["kind"]][0]
                    raise _wrong(path, key, f"stands for the same as {shown(other)}; one adapter a file is supported")
                found[match["kind"]] = (key, _values(path, file, key))
            elif not _COPY.fullmatch(key):
                extra.append(f"tensor {shown(key)} is no low-rank part of a weight that an adapter can change")
        about = _about(path, file.metadata() or {})
    for line in extra:
        if strict:
            raise AdapterError(f"{shown_path(folder if line.startswith(CONFIG) else path)}: {line}")
        skip(line)
    deltas = {place: _delta(path, place, found, config) for place, found in by_place.items()}
    if not deltas:
        raise AdapterError(f"{shown_path(path)}: has no pair lora_A, lora_B of a weight that an adapter can change")
    layers = max((place[1] + 1 for place in deltas if len(place) > 1), default=0)
    source = folder.resolve().name
    return Adapter(build_deltas(deltas, layers), source=source, row_order="hf", base=config.base, **about)


def _weights_path(folder: FilePath) -> FilePath:
    path = folder / WEIGHTS
    if path.is_file():
        return path
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise AdapterError(
            f"{shown_path(folder)}: has no {WEIGHTS}, only a pickle, which may run any program and is never opened: "
            "save it as safetensors"
        )
    raise AdapterError(f"{shown_path(folder)}: has no {WEIGHTS}; a PEFT adapter needs it beside {CONFIG}")


def _opened(path: FilePath) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{shown_path(path)}: is no whole safetensors file: {shown(str(error))}") from None


def _place(match: re.Match) -> Path | None:
    """The path of the weight that a tensor belongs to; None where there is no such weight."""
    name, layer, kind = TARGET_OF[match["target"]], match["layer"], match["kind"]
    if (name == "embedding") != kind.startswith("lora_embedding") and kind != "lora_magnitude_vector":
        return None
    if (name in ("embedding", "output")) != (layer is None):
        return None
    return (name,) if layer is None else ("layers", int(layer), *PARTS[name])


def _values(path: FilePath, file: Any, key: str) -> np.ndarray:
    """A tensor in float32, to which 16-bit numbers widen exactly. Checked for its type and for values that are none."""
    try:
        dtype = file.get_slice(key).get_dtype()
        if dtype not in _DTYPES:
            raise _wrong(path, key, f"is {dtype}; want one of {', '.join(_DTYPES)}")
        with np.errstate(over="ignore"):
            values = np.asarray(file.get_tensor(key), np.float32)
    except (SafetensorError, OSError, ValueError) as error:
        raise _wrong(path, key, f"cannot be read: {shown(str(error))}") from None
    if not np.isfinite(values).all():
        raise _wrong(path, key, "has a value that is NaN, infinite or beyond float32; every value must be finite")
    return values


def _about(path: FilePath, metadata: dict[str, str]) -> dict[str, Any]:
    """What `write_peft` notes in the weights' file about the base model, as fields of an `Adapter`."""
    about: dict[str, Any] = {"architecture": metadata.get("realm.architecture")}
    heads = metadata.get("realm.heads")
    if heads is not None:
        match = re.fullmatch(r"([1-9][0-9]{0,4}),([1-9][0-9]{0,4})", heads)
        if not match:
            raise AdapterError(f"{shown_path(path)}: realm.heads is {shown(heads)}; want two numbers as in '32,8'")
        about["heads"] = (int(match[1]), int(match[2]))
    return about


def _delta(path: FilePath, place: Path, found: Found, config: PeftConfig) -> Delta:
    module, embedding = module_name(place), place == ("embedding",)
    kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for kind in (*kinds, "lora_magnitude_vector") if config.dora else kinds:
        if kind not in found:
            raise AdapterError(f"{shown_path(path)}: {module} has no {kind}; it has {', '.join(sorted(found))}")
    (a_key, a), (b_key, b) = found[kinds[0]], found[kinds[1]]
    for key, value in ((a_key, a), (b_key, b)):
        if value.ndim != 2:
            raise _wrong(path, key, f"has shape {value.shape}; want two dimensions")
    rank = config.rank_of(module)
    if a.shape[0] != b.shape[1]:
        raise _wrong(path, b_key, f"has shape {b.shape}, and its lora_A {a.shape}: their ranks differ")
    if a.shape[0] != rank:
        raise _wrong(path, a_key, f"has shape {a.shape}, which is rank {a.shape[0]}; {CONFIG} says rank {rank}")
    magnitude = None
    if "lora_magnitude_vector" in found:
        key, magnitude = found["lora_magnitude_vector"]
        if not config.dora:
            raise _wrong(path, key, f"is DoRA's, but use_dora in {CONFIG} is not set")
        if magnitude.size != b.shape[0]:
            raise _wrong(path, key, f"has shape {magnitude.shape}; want ({b.shape[0]},)")
        magnitude = jnp.asarray(magnitude.reshape(-1))
    if embedding:
        a, b = b.T, a.T  # of the lookup: rows of A are found by token, B leads from ranks to width
    return Delta(jnp.asarray(a), jnp.asarray(b), jnp.float32(config.scale_of(module)), magnitude)


def _wrong(path: FilePath, key: str, message: str) -> AdapterError:
    return AdapterError(f"{shown_path(path)}: tensor {shown(key)} {message}")


def write_peft(adapter: Adapter, folder: FilePath, dtype: np.dtype, cast: Callable[..., np.ndarray]) -> None:
    """Writes both files into a folder that is there. adapter: in Hugging Face's row order.

    cast(path, what, values, dtype): the array to write, or an AdapterError.
    """
    tensors = {}
    for path, delta in adapter.items():
        embedding = path == ("embedding",)
        a, b = (delta.b.T, delta.a.T) if embedding else (delta.a, delta.b)
        kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        for kind, values in zip((*kinds, "lora_magnitude_vector"), (a, b, delta.magnitude), strict=True):
            if values is not None:
                tensors[f"base_model.model.{module_name(path)}.{kind}"] = cast(path, kind, values, dtype)
    metadata = {"format": "pt"}
    if adapter.architecture is not None:
        metadata["realm.architecture"] = adapter.architecture
    if adapter.heads is not None:
        metadata["realm.heads"] = "{},{}".format(*adapter.heads)
    (folder / CONFIG).write_text(json.dumps(peft_config(adapter), indent=2) + "\n", encoding="utf-8")
    _write_safetensors(folder / WEIGHTS, tensors, metadata)


def _write_safetensors(path: FilePath, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """The same bytes for the same contents, which `safetensors` does not promise: it shuffles the metadata."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        dtype = _DTYPE_NAMES[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(array.tobytes())


def module_name(path: Path) -> str:
    """The name of a weight's module in a Hugging Face model: "model.layers.0.self_attn.q_proj"."""
    if path == ("output",):
        return MODULES["output"]
    return f"model.{MODULES[path[-1]]}" if len(path) == 1 else f"model.layers.{path[1]}.{MODULES[path[-1]]}"


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """The adapter_config.json of an adapter: the commonest rank and alpha, patterns for the rest."""
    ranks = {module_name(path): delta.rank for path, delta in adapter.items()}
    alphas = {module_name(path): peft_alpha(float(delta.scale), delta.rank) for path, delta in adapter.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "base_model_name_or_path": adapter.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": list(_target_modules(adapter)),
        "task_type": "CAUSAL_LM",
        "use_dora": any(delta.magnitude is not None for _, delta in adapter.items()),
        "use_rslora": False,
    }


def _target_modules(adapter: Adapter) -> Iterator[str]:
    """Short names of what all layers have, whole names of the rest."""
    layers = len(adapter.deltas.layers)
    count = Counter(path[-1] for path, _ in adapter.items())
    short = [name for name, n in count.items() if n == layers or name in ("embedding", "output")]
    yield from (MODULES[name].rpartition(".")[2] for name in short)
    yield from (module_name(path) for path, _ in adapter.items() if path[-1] not in short)
