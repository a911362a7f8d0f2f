"""Adapters from and to files: Hugging Face PEFT directories and llama.cpp's adapter GGUF."""

import os

from realm_jax.lora.adapter import Adapter
from realm_jax.model.model import Model


def load_adapter(path: str | os.PathLike, model: Model | None = None, *, strict: bool = True) -> Adapter:
    raise NotImplementedError
