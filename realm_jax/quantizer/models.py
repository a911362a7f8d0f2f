"""Models quantized in memory, for experiments and notebooks; `files` does it for files that need not fit."""

import dataclasses
from collections.abc import Mapping

import jax

from realm_jax.errors import RealmError
from realm_jax.gguf.types import shown
from realm_jax.model.model import Model
from realm_jax.model.params import TensorSpec, Weight, build_params, get_weight, tensor_specs
from realm_jax.quant import DEFAULT_METHOD, DENSE_FORMATS, QuantizedTensor
from realm_jax.quantizer.encode import encode
from realm_jax.quantizer.imatrix import Imatrix
from realm_jax.quantizer.metadata import quantized_fields
from realm_jax.quantizer.mixes import choose_formats, resolve_name


def quantize_model(
    model: Model, formats: Mapping[str, str] | str, *, imatrix: Imatrix | None = None, method: str = DEFAULT_METHOD
) -> Model:
    """The model with weights in other formats; those that are in theirs already stay the same arrays.

    formats: tensor name -> format (others stay as they are), or the name of a mix or format for the whole model, as
    `choose_formats` has it. imatrix: importance of the columns. method: of `realm_jax.quant.quantize`. Packed
    weights are dequantized first. Raises RealmError, naming the tensor, for what does not fit.
    """
    specs = {s.name: s for s in tensor_specs(model.config) if get_weight(model.params, s.path) is not None}
    origin = model.origin
    if isinstance(formats, str):
        mix = resolve_name(formats)
        formats = formats_of_model(model, mix, has_imatrix=imatrix is not None)
        origin = dataclasses.replace(origin, fields=quantized_fields(origin.fields, mix, imatrix))
    for name in formats:
        if name not in specs:
            raise RealmError(f"{origin.source}: has no tensor {shown(name)} to quantize; its weights: {_some(specs)}")
    weights = {s.path: get_weight(model.params, s.path) for s in specs.values()}
    for name, format in formats.items():
        path = specs[name].path
        if format_of(weights[path]) != format:
            weights[path] = quantize_weight(origin.source, name, weights[path], format, imatrix, method)
    return model.replace(params=build_params(model.config, weights), origin=origin)


def formats_of_model(model: Model, mix: str, *, has_imatrix: bool = False) -> dict[str, str]:
    """Tensor name -> format, what a mix or a uniform format gives to the weights of this model."""
    metadata = model.config.metadata() | {key: field.plain for key, field in model.origin.fields.items()}
    tensors = {}
    for spec in tensor_specs(model.config):
        weight = get_weight(model.params, spec.path)
        if weight is not None:
            tensors[spec.name] = (format_of(weight), tuple(weight.shape))
    return choose_formats(mix, metadata, tensors, has_imatrix=has_imatrix)


def quantize_weight(
    source: str, name: str, weight: Weight, format: str, imatrix: Imatrix | None, method: str
) -> jax.Array | QuantizedTensor:
    """A weight (N, K), or some rows of it, in another format; errors say that it is tensor `name` of `source`."""
    shape = tuple(weight.shape)
    importance = imatrix.importance(name, shape) if imatrix else None
    if importance is not None:
        importance = importance.reshape(*shape[:-2], 1, shape[-1])
    try:
        return encode(weight, format, importance, method)
    except RealmError as error:
        raise RealmError(f"{source}: tensor {name}: {error}") from None


def format_of(weight: Weight) -> str:
    """The ggml name of the format that a weight has."""
    if isinstance(weight, QuantizedTensor):
        return weight.format
    return next((name for name, dtype in DENSE_FORMATS.items() if dtype == weight.dtype), str(weight.dtype))


def _some(specs: Mapping[str, TensorSpec]) -> str:
    names = list(specs)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
