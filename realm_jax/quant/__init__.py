"""ggml block formats: raw blocks <-> planes <-> floats."""

from realm_jax.quant.encode import quantize
from realm_jax.quant.formats import DENSE_FORMATS, FORMATS, check_finite, get_format, row_bytes
from realm_jax.quant.layout import Affine, Field, Format
from realm_jax.quant.methods import DEFAULT_METHOD, METHODS
from realm_jax.quant.tensor import QuantizedTensor, dequantize, load_weight, raw_bytes

__all__ = [
    "DEFAULT_METHOD",
    "DENSE_FORMATS",
    "FORMATS",
    "METHODS",
    "Affine",
    "Field",
    "Format",
    "QuantizedTensor",
    "check_finite",
    "dequantize",
    "get_format",
    "load_weight",
    "quantize",
    "raw_bytes",
    "row_bytes",
]
