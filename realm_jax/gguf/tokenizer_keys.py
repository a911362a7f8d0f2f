"""Typed access to a file's `tokenizer.ggml.*` keys. Used while a tokenizer is built (`vocabulary.py`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from realm_jax.errors import GGUFError

PREFIX = "tokenizer.ggml."


class TokenizerKeys:
    """A file's metadata, by the last part of the key. Every complaint (GGUFError) names the file and the key.

    Getters return None, or the default, where a key is missing.
    """

    def __init__(self, metadata: Mapping[str, Any], source: str):
        self.metadata = metadata
        self.source = source

    def error(self, key: str, problem: str) -> GGUFError:
        return GGUFError(f"{self.source}: {PREFIX}{key} {problem}")

    def text(self, key: str) -> str | None:
        value = self.metadata.get(PREFIX + key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"must be a string, not {_kind(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            return default
        if not isinstance(value, bool | np.bool_):
            raise self.error(key, f"must be true or false, not {_kind(value)}")
        return bool(value)

    def integer(self, key: str) -> int | None:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            return None
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise self.error(key, f"must be a token id, not {_kind(value)}")
        return int(value)

    def strings(self, key: str) -> Sequence[str] | None:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or set(map(type, value)) - {str}:
            raise self.error(key, f"must be an array of strings, not {_kind(value)}")
        return value

    def numbers(self, key: str, kinds: str, count: int) -> np.ndarray | None:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            return None
        array = np.asarray(value) if isinstance(value, np.ndarray | list | tuple) else None
        if array is None or array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
            wanted = "numbers" if "f" in kinds else "integers"
            raise self.error(key, f"must be an array of {wanted}, not {_kind(value)}")
        if len(array) != count:
            raise self.error(key, f"has {len(array)} entries for {count} tokens: one a token would be right")
        return array


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    if isinstance(value, list | tuple):
        kinds = sorted({type(item).__name__ for item in value})
        return f"an array of {', '.join(kinds) or 'nothing'}"
    return f"{type(value).__name__} {str(value)[:40]!r}"
