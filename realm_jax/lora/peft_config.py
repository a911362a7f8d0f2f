"""`adapter_config.json` of a Hugging Face PEFT adapter, read without trust: ranks, scales, and what is not supported.

Called by `lora.peft`. The keys are those of `LoraConfig` (https://github.com/huggingface/peft, up to version 0.21).
"""

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realm_jax.errors import AdapterError
from realm_jax.gguf.types import shown, shown_path

MAX_BYTES = 1 << 24
MAX_RANK = 1 << 16
# Each of these makes PEFT compute something else; there is no leaving them out.
OTHER_METHODS = (
    "layer_replication", "alora_invocation_tokens", "invocation_string", "monteclora_config", "kasa_config",
    "arrow_config", "megatron_config", "target_parameters",
)  # fmt: skip
# What comes in addition to the low-rank pairs: a lenient load leaves it out.
ADDITIONS = ("modules_to_save", "trainable_token_indices", "lora_bias")
# These subtract from the base model what the adapter begins with, so the adapter is for no model that is in any file.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """What the tensors of a PEFT adapter must be and by how much they count.

    rank_pattern, alpha_pattern: what differs from rank and alpha, by patterns of module names, the first that matches.
    rslora: alpha counts by the square root of the rank. dora: every weight has a magnitude. base: name of its model.
    additions: what stands in the config that a lenient load leaves out.
    """

    rank: int
    alpha: float
    rank_pattern: tuple[tuple[re.Pattern, int], ...]
    alpha_pattern: tuple[tuple[re.Pattern, float], ...]
    rslora: bool
    dora: bool
    base: str | None
    additions: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """The rank of a module by its name, "model.layers.0.self_attn.q_proj"."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What multiplies b @ a of a module."""
        rank = self.rank_of(module)
        return _first_match(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def read_config(path: Path) -> PeftConfig:
    """Reads and checks an adapter_config.json. AdapterError, one line that names file and key, for what is wrong."""
    read = _Reader(path, read_json(path))
    kind = read("peft_type", str)
    if kind != "LORA":
        raise read.error(f"peft_type is {shown(str(kind))}; only LORA is supported")
    for key in OTHER_METHODS:
        if read.values.get(key):
            raise read.error(f"{key} is set, which is not supported: only plain LoRA, rsLoRA and DoRA are")
    for key, value in read.values.items():
        if key.startswith("use_") and value and key not in ("use_rslora", "use_dora"):
            raise read.error(f"{shown(key)} is set, which is not supported: only plain LoRA, rsLoRA and DoRA are")
    start = read.values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise read.error(
            f"init_lora_weights is {shown(start)}, which changes the base model: save it from PEFT as plain LoRA, "
            "with path_initial_model_for_weight_conversion"
        )
    return PeftConfig(
        rank=read.rank("r", read.values.get("r", 8)),
        alpha=read.alpha("lora_alpha", read.values.get("lora_alpha", 8)),
        rank_pattern=read.pattern("rank_pattern", read.rank),
        alpha_pattern=read.pattern("alpha_pattern", read.alpha),
        rslora=bool(read("use_rslora", bool, False)),
        dora=bool(read("use_dora", bool, False)),
        base=read("base_model_name_or_path", str, None),
        additions=tuple(key for key in ADDITIONS if read.values.get(key)),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file. AdapterError names the file."""
    where = shown_path(path)
    try:
        if not path.is_file():
            raise AdapterError(f"{where}: is not there, or not a file")
        if path.stat().st_size > MAX_BYTES:
            raise AdapterError(f"{where}: is larger than {MAX_BYTES:,} bytes, which no such file is")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"{where}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits
        raise AdapterError(f"{where}: is not JSON: {shown(str(error))}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{where}: holds a JSON {type(value).__name__}; want an object")
    return value


class _Reader:
    """Typed access to the config; every failure names the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path, self.values = path, values

    def error(self, message: str) -> AdapterError:
        return AdapterError(f"{shown_path(self.path)}: {message}")

    def __call__(self, key: str, kind: type, *default: Any) -> Any:
        """The value of a key, of this type; the default where it is absent or null."""
        value = self.values.get(key)
        if value is None and default:
            return default[0]
        if not isinstance(value, kind):
            raise self.error(f"{key} is {_described(value)}; want {kind.__name__}")
        return value

    def rank(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
            raise self.error(f"{key} is {_described(value)}; want a whole number from 1 to {MAX_RANK}")
        return value

    def alpha(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e30:
            raise self.error(f"{key} is {_described(value)}; want a finite number")
        return float(value)

    def pattern(self, key: str, check: Any) -> tuple[tuple[re.Pattern, Any], ...]:
        found = self(key, dict, {})
        return tuple(
            (self._compiled(key, name), check(f"{key}[{shown(name)}]", value)) for name, value in found.items()
        )

    def _compiled(self, key: str, name: str) -> re.Pattern:
        """The pattern as PEFT matches it. One that could take a regular expression engine for ever is refused."""
        bare = name.replace("(?:", "(")
        if len(name) > 1000 or sum(bare.count(c) for c in "*+?{") > 3 or re.search(r"\)[*+{]", bare):
            raise self.error(f"{key} has the pattern {shown(name)}, which repeats too much: write plain module names")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return re.compile(rf"(.*\.)?({name})$")
        except (re.error, OverflowError, RecursionError) as error:
            message = f"{key} has the pattern {shown(name)}, which is no regular expression: {shown(str(error))}"
            raise self.error(message) from None


def _first_match(patterns: tuple[tuple[re.Pattern, Any], ...], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _described(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
