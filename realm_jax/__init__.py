"""A pure-JAX research framework for block-quantized (GGUF) transformers.

Names are imported when first used, so that tools which only read a file's header need not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from realm_jax.errors import AdapterError as AdapterError
from realm_jax.errors import GGUFError as GGUFError
from realm_jax.errors import RealmError as RealmError
from realm_jax.errors import RequestError as RequestError

if TYPE_CHECKING:
    from realm_jax.decode.generate import Completion, generate, stream
    from realm_jax.engine import Engine, Request
    from realm_jax.logits import forward
    from realm_jax.lora import Adapter, load_adapter, save_adapter
    from realm_jax.model import Model, load, save
    from realm_jax.quant import QuantizedTensor, dequantize, quantize
    from realm_jax.quantizer import merge

_HOMES = {
    "realm_jax.decode.generate": ("Completion", "generate", "stream"),
    "realm_jax.engine": ("Engine", "Request"),
    "realm_jax.logits": ("forward",),
    "realm_jax.lora": ("Adapter", "load_adapter", "save_adapter"),
    "realm_jax.model": ("Model", "load", "save"),
    "realm_jax.quant": ("QuantizedTensor", "dequantize", "quantize"),
    "realm_jax.quantizer": ("merge",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Adapter",
    "AdapterError",
    "Completion",
    "Engine",
    "GGUFError",
    "Model",
    "QuantizedTensor",
    "RealmError",
    "Request",
    "RequestError",
    "dequantize",
    "forward",
    "generate",
    "load",
    "load_adapter",
    "merge",
    "quantize",
    "save",
    "save_adapter",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'realm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
