"""What the base model of an adapter is, from its files' heads alone: a GGUF, or Hugging Face's config.json.

Called where adapters are converted, which takes sizes and heads but no weights.
"""

from pathlib import Path
from typing import Any

from realm_jax.errors import AdapterError, GGUFError
from realm_jax.gguf.reader import open_gguf
from realm_jax.gguf.types import shown, shown_path
from realm_jax.lora.peft_config import read_json
from realm_jax.model.config import Config

MODEL_TYPES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
# config.json | GGUF | needed
KEYS = (
    ("num_hidden_layers", "block_count", True),
    ("hidden_size", "embedding_length", True),
    ("intermediate_size", "feed_forward_length", True),
    ("num_attention_heads", "attention.head_count", True),
    ("vocab_size", "vocab_size", True),
    ("num_key_value_heads", "attention.head_count_kv", False),
    ("head_dim", "attention.key_length", False),
    ("head_dim", "attention.value_length", False),
)


def read_base(path: Path) -> Config:
    """The config of a GGUF file, of a Hugging Face directory, or of its config.json. Rope is not read from the latter.

    Raises RealmError, one line that names file and key, for what is no model or not supported.
    """
    if path.is_dir() or path.name == "config.json":
        return _from_hugging_face(path / "config.json" if path.is_dir() else path)
    with open_gguf(path) as file:
        embedding = file.tensors.get("token_embd.weight")
        if embedding is None:
            raise GGUFError(f"{shown_path(path)}: has no tensor token_embd.weight; give a model as base")
        return Config.from_metadata(file.metadata, embedding.shape[0], str(file.path))


def _from_hugging_face(path: Path) -> Config:
    values = read_json(path)
    name = MODEL_TYPES.get(str(values.get("model_type")))
    if name is None:
        raise AdapterError(
            f"{shown_path(path)}: model_type is {shown(str(values.get('model_type')))}, which is not supported; "
            f"supported: {', '.join(MODEL_TYPES)}"
        )
    metadata: dict[str, Any] = {"general.architecture": name}
    metadata |= {f"{name}.context_length": 1, f"{name}.attention.layer_norm_rms_epsilon": 1e-5}  # no matter here
    for theirs, ours, needed in KEYS:
        value = values.get(theirs)
        if needed and (isinstance(value, bool) or not isinstance(value, int)):
            raise AdapterError(f"{shown_path(path)}: {theirs} is {shown(str(value))}; want a whole number")
        if value is not None:
            metadata[f"{name}.{ours}"] = value
    return Config.from_metadata(metadata, metadata[f"{name}.vocab_size"], str(path))
