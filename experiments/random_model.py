"""Models of random weights in any shape and mix of formats, packed from the start: for measuring speed, not for text.

    python experiments/random_model.py out.gguf --shape llama-8b --mix Q4_K_M

No weight passes through an encoder. Each plane is drawn as bits on the device, one compiled program a format and shape.
The scales are such that the weights of a matrix (N, K) have a root mean square of 1 / sqrt(K), which keeps activations
of ordinary size through any number of layers. A mix gives each tensor the format that llama.cpp would give it. The same
seed gives the same weights in memory (`random_model`) and in a file (`write_model`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.errors import RealmError
from realm_jax.gguf.types import Field as Metadata
from realm_jax.gguf.types import field
from realm_jax.gguf.unicode import byte_characters
from realm_jax.gguf.writer import write_gguf
from realm_jax.model import Config, Model, Rope
from realm_jax.model.model import Origin
from realm_jax.model.params import TensorSpec, Weight, build_params, tensor_specs
from realm_jax.quant import QuantizedTensor, get_format, raw_bytes
from realm_jax.quant.formats import DENSE_FORMATS
from realm_jax.quant.layout import F16, F32, Field
from realm_jax.quantizer.mixes import choose_formats, file_type_id, resolve_name


def _llama(layers: int, width: int, ffn: int, heads: int, kv_heads: int, vocab: int, context: int) -> Config:
    head = width // heads
    return Config(
        architecture="llama", vocab_size=vocab, context_length=context, layers=layers, width=width, ffn_width=ffn,
        heads=heads, kv_heads=kv_heads, head_width=head, norm_eps=1e-5, rope=Rope(dimensions=head, base=500000.0),
    )  # fmt: skip


SHAPES = {
    "llama-8b": _llama(32, 4096, 14336, 32, 8, 128256, 131072),  # Llama 3.1 8B, without its rope factors
    "llama-3b": _llama(28, 3072, 8192, 24, 8, 128256, 131072),  # Llama 3.2 3B, with an output matrix of its own
    "llama-1b": _llama(16, 2048, 8192, 32, 8, 128256, 131072),
    "toy": _llama(2, 256, 512, 4, 2, 512, 4096),
}
# Where a block has a second scale: its ratio to the first, so that the weights of random codes have a mean of zero.
SECOND = {"Q4_1": -7.5, "Q5_1": -15.5, "Q8_1": 0.0, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}
SAMPLE_BLOCKS, SAMPLE_SCALE = 64, 2.0**-6


def shape_config(shape: str, layers: int = 0) -> Config:
    """The sizes of a shape of `SHAPES`, with so many layers instead where not 0. RealmError for an unknown one."""
    if shape not in SHAPES:
        raise RealmError(f"shape {shape!r} is not known; known: {', '.join(SHAPES)}")
    if layers < 0:
        raise RealmError(f"layers is {layers}; want 0 for those of the shape, or more")
    return dataclasses.replace(SHAPES[shape], layers=layers or SHAPES[shape].layers)


def model_formats(config: Config, mix: str) -> dict[str, str]:
    """Tensor name -> format, in the order of a file: what llama.cpp would choose. mix: a mix, or a format for all."""
    wanted = [s for s in tensor_specs(config) if not s.optional or s.name == "output.weight"]
    tensors = {s.name: ("F32" if len(s.shape) == 1 else "F16", s.shape) for s in wanted}
    return choose_formats(mix, config.metadata(), tensors)


def random_model(config: Config, mix: str, seed: int = 0) -> Model:
    """A model of that shape on the device, without a tokenizer, made in seconds whatever its size."""
    tensors = list(_tensors(config, mix, seed))
    kinds = {(format, spec.shape): make for spec, format, make in tensors}
    with ThreadPoolExecutor() as pool:  # one of each kind first: their programs compile side by side
        list(pool.map(lambda make: jax.block_until_ready(make()), kinds.values()))
    weights = {spec.path: make() for spec, _, make in tensors}
    source = f"random weights, {config.layers} layers of width {config.width}, {resolve_name(mix)}"
    return Model(build_params(config, weights), config, None, Origin(source, {}))


def model_specs(config: Config, mix: str) -> Model:
    """The same model with a `jax.ShapeDtypeStruct` in the place of every array: for compiling without running."""
    weights = {s.path: weight_spec(name, s.shape) for s, name, _ in _tensors(config, mix, 0)}
    return Model(build_params(config, weights), config, None, Origin(f"{resolve_name(mix)}, shapes only", {}))


def write_model(path: str | Path, config: Config, mix: str, seed: int = 0) -> None:
    """The model of `random_model` as a GGUF file with a trivial vocabulary, one tensor in memory at a time."""

    def produced(make: Callable[[], Weight]) -> np.ndarray:
        return raw_bytes(make())[1]

    about = config.metadata() | {"general.name": f"random {resolve_name(mix)}", "general.quantization_version": 2}
    if (number := file_type_id(resolve_name(mix))) is not None:
        about["general.file_type"] = number
    fields = {key: field(value) for key, value in about.items()} | vocabulary(config.vocab_size)
    tensors = [
        (s.name, name, s.shape, functools.partial(produced, make)) for s, name, make in _tensors(config, mix, seed)
    ]
    write_gguf(path, fields, tensors)


def vocabulary(size: int) -> dict[str, Metadata]:
    """Metadata of a byte-level vocabulary: two control tokens, the 256 bytes, and names without meaning."""
    if size < 259:
        raise RealmError(f"a vocabulary of {size} tokens has no room for 256 bytes and 3 more; want 259")
    letters = list(byte_characters())
    tokens = ["<s>", "</s>", *letters, "th", *(f"<|{i}|>" for i in range(259, size))]
    values = {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [3, 3] + [1] * (size - 2), "merges": ["t h"],
        "bos_token_id": 0, "eos_token_id": 1, "add_bos_token": True,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": field(value) for key, value in values.items()}


def _tensors(config: Config, mix: str, seed: int) -> Iterator[tuple[TensorSpec, str, Callable[[], Weight]]]:
    """Each tensor, its format, and what makes it."""
    specs, key = {spec.name: spec for spec in tensor_specs(config)}, jax.random.key(seed)
    for i, (name, format) in enumerate(model_formats(config, mix).items()):
        spec = specs[name]
        size = spec.shape[-1] ** -0.5
        if spec.path[-1] in ("o", "down"):  # these write to the residual stream, as in `init_params`
            size /= (2 * config.layers) ** 0.5
        yield spec, format, functools.partial(_weight, key, i, format, spec.shape, size)


def _weight(key: jax.Array, index: int, format: str, shape: tuple[int, ...], size: float) -> Weight:
    if len(shape) == 1:
        return jnp.ones(shape, DENSE_FORMATS[format])
    return random_weight(jax.random.fold_in(key, index), format, shape, size)


def random_weight(key: jax.Array, format: str, shape: tuple[int, ...], size: float) -> Weight:
    """A matrix (N, K) in a block format or a dense one, of root mean square about `size`."""
    if format in DENSE_FORMATS:
        return _dense(key, format, shape, jnp.float32(size))
    return QuantizedTensor(_planes(key, format, shape, jnp.float32(size / unit_size(format))), format)


@functools.cache
def unit_size(format: str) -> float:
    """Root mean square of random weights whose blocks have a scale of about 1, from a few of them."""
    shape = (1, SAMPLE_BLOCKS * get_format(format).block_size)
    sample = QuantizedTensor(_planes(jax.random.key(1), format, shape, jnp.float32(SAMPLE_SCALE)), format)
    return float(jnp.sqrt(jnp.mean(sample.dequantize() ** 2))) / SAMPLE_SCALE


def weight_spec(format: str, shape: tuple[int, ...]) -> Weight:
    """The shapes and dtypes of a weight."""
    if format in DENSE_FORMATS:
        return jax.ShapeDtypeStruct(shape, DENSE_FORMATS[format])
    kind = get_format(format)
    blocks = kind.blocks_in_row(shape[-1])
    planes = {f.name: jax.ShapeDtypeStruct((*shape[:-1], *f.tail(blocks)), f.dtype) for f in kind.fields}
    return QuantizedTensor(planes, format)


# --- bits ------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("format", "shape"))
def _dense(key: jax.Array, format: str, shape: tuple[int, ...], size: jax.Array) -> jax.Array:
    return (size * jax.random.normal(key, shape)).astype(DENSE_FORMATS[format])


@functools.partial(jax.jit, static_argnames=("format", "shape"))
def _planes(key: jax.Array, format: str, shape: tuple[int, ...], scale: jax.Array) -> dict[str, jax.Array]:
    """All planes of a matrix whose blocks have scales of about `scale`."""
    kind = get_format(format)
    blocks = kind.blocks_in_row(shape[-1])
    second = SECOND.get(format, 1.0)
    return {
        f.name: _plane(jax.random.fold_in(key, i), f, (*shape[:-1], *f.tail(blocks)), scale, second, format == "TQ2_0")
        for i, f in enumerate(kind.fields)
    }


def _plane(
    key: jax.Array, field: Field, shape: tuple[int, ...], scale: jax.Array, second: float, ternary: bool
) -> jax.Array:
    """Random bits, as far as a block can hold them in this field, or scales. Says nothing of the order of the items."""
    if field.floats and field.number in (F16, F32):
        numbers = scale * jax.random.uniform(key, shape, minval=0.75, maxval=1.25)
        if np.dtype(field.dtype) != np.uint32:
            return numbers.astype(field.dtype)
        low, high = (jax.lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16).astype(jnp.uint32)
                     for x in (numbers, second * numbers))  # fmt: skip
        return low | high << 16
    bits = jax.random.bits(key, shape, np.dtype(field.dtype))
    free, fixed = possible_bits(field)
    bits = bits & free | fixed
    if ternary:  # codes are 0, 1 and 2; what was drawn as 3 is 1, so that the mean is
        bits &= ~(bits & bits << 1 & jnp.uint32(0xAAAAAAAA))
    return bits if not field.floats else _small_scales(bits, field, scale)


def possible_bits(field: Field) -> tuple[np.generic, np.generic]:
    """The bits of an item of a plane that differ between blocks, and those that are always set.

    RealmError where that depends on the place of the item, which nothing here may know.
    """
    none, every = np.dtype(field.dtype).type(0), ~np.dtype(field.dtype).type(0)
    if field.unpack is None:
        return every, none
    raw = np.dtype(field.raw_dtype).type
    low, high = (field.unpack(np.full((1, field.raw_words), fill, raw)) for fill in (raw(0), ~raw(0)))
    free, fixed = low ^ high, low & high
    if (free != free.flat[0]).any() or (fixed != fixed.flat[0]).any():
        raise RealmError(f"field {field.name}: which bits a block can hold depends on their place")
    return free.flat[0], fixed.flat[0]


def _small_scales(bits: jax.Array, field: Field, scale: jax.Array) -> jax.Array:
    """Scales that are no float16 of their own: the same for all blocks, the nearest to `scale` that fits any place.

    Numbers of one byte fill their items. The float16 of IQ1_M has a nibble above each 12 other bits of two words: here
    both words have the same two.
    """
    if field.number.special.itemsize == 1:
        candidates = np.arange(1, field.number.special, dtype=np.uint32) * np.uint32(0x01010101)
        keep = np.uint32(0)
    else:
        high, low = (x.astype(np.uint32) for x in np.divmod(np.arange(4, 124), 16))  # exponents from 1 to 30
        candidates = high << 28 | low << 12
        keep = np.uint32(0x0FFF0FFF)
    return bits & keep.astype(bits.dtype) | _nearest(candidates, field, scale).astype(bits.dtype)


def _nearest(candidates: np.ndarray, field: Field, scale: jax.Array) -> jax.Array:
    """The candidate (a word) that reads as the number nearest to `scale`, by ratio."""
    plane = np.broadcast_to(candidates.astype(field.dtype), (*field.tail(1), len(candidates)))
    plane = jnp.moveaxis(jnp.asarray(plane), -1, 0)  # one block a candidate
    (values,) = field.number.read(plane)
    distance = jnp.abs(jnp.log(values.reshape(len(candidates), -1)[:, 0]) - jnp.log(scale))
    return jnp.asarray(candidates)[jnp.argmin(distance)]


# --- command line ----------------------------------------------------------------------------------------------------


@click.command(help=__doc__.split("\n")[0], context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--shape", default="llama-8b", show_default=True, help=f"One of {', '.join(SHAPES)}.")
@click.option("--layers", default=0, metavar="N", help="So many layers in place of the shape's.")
@click.option("--mix", default="Q4_K_M", show_default=True, help="A mix of llama.cpp, or one format for all matrices.")
@click.option("--seed", default=0, show_default=True)
def command(out: Path, shape: str, layers: int, mix: str, seed: int) -> None:
    try:
        write_model(out, shape_config(shape, layers), mix, seed)
    except RealmError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    command()
