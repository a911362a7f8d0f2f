"""`realm inspect`: what stands in a GGUF file. Needs no JAX, and no support for the file's architecture or formats."""

import math
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np

from realm_jax.cli import output
from realm_jax.cli.options import common_options, file_argument
from realm_jax.cli.text import one_line
from realm_jax.gguf.reader import GGUFFile, open_gguf
from realm_jax.gguf.types import Field, TensorInfo, ValueType

WHOLE_ARRAY = 64  # longer arrays are given as type, length and head, unless --full
HEAD = 8


@click.command(name="inspect")
@file_argument("file", "FILE")
@click.option("--full", is_flag=True, help="Give metadata arrays and strings whole, however long.")
@common_options
def command(file: Path, full: bool, as_json: bool) -> None:
    """Show architecture, formats, metadata and tensors of a GGUF file.

    Reads only the head of the file. With --json, metadata arrays of more than 64 items are given as
    {"type", "length", "head"}, unless --full.
    """
    with open_gguf(file) as gguf:
        if as_json:
            output.print_json(_as_json(gguf, full))
        else:
            _show(gguf, full)


def _as_json(gguf: GGUFFile, full: bool) -> dict[str, Any]:
    tensors = list(gguf.tensors.values())
    parameters, size = _total(tensors)
    return {
        "file": str(gguf.path),
        "files": len(gguf.paths),
        "version": gguf.version,
        "alignment": gguf.alignment,
        "architecture": _text_or_none(gguf, "general.architecture"),
        "name": _text_or_none(gguf, "general.name"),
        "parameters": parameters,
        "bytes": size,
        "bits_per_weight": _bits(size, parameters),
        "formats": {
            name: {
                "tensors": len(group),
                "parameters": _total(group)[0],
                "bytes": _total(group)[1],
                "bits_per_weight": _bits(_total(group)[1], _total(group)[0]),
            }
            for name, group in _by_format(tensors).items()
        },
        "metadata": {key: _json_value(field, full) for key, field in gguf.fields.items()},
        "tensors": [{"name": t.name, "format": t.format, "shape": list(t.shape), "bytes": t.nbytes} for t in tensors],
    }


def _show(gguf: GGUFFile, full: bool) -> None:
    screen = output.console(sys.stdout)
    tensors = list(gguf.tensors.values())
    parameters, size = _total(tensors)
    parts = f", {len(gguf.paths)} files" if len(gguf.paths) > 1 else ""
    name = _text_or_none(gguf, "general.name")
    architecture = _text_or_none(gguf, "general.architecture")
    screen.print(one_line(f"{gguf.path}: GGUF version {gguf.version}{parts}"))
    screen.print(one_line(f"architecture  {architecture or '(none)'}{f' ({name})' if name else ''}"))
    bits = f", {_bits(size, parameters):.2f} bits a weight" if parameters else ""
    screen.print(f"weights       {output.count_text(parameters)} in {output.size_text(size)}{bits}\n")
    if tensors:
        screen.print(_format_table(tensors, size), "", sep="\n")
    screen.print(_metadata_table(gguf, full))
    if tensors:
        screen.print("", _tensor_table(tensors), sep="\n")


def _format_table(tensors: list[TensorInfo], size: int) -> Any:
    numbers = ("tensors", "weights", "size", "bits a weight", "share")
    made = output.table("format", *numbers, title="Formats", numbers=numbers)
    for name, group in _by_format(tensors).items():
        weights, taken = _total(group)
        sizes = output.count_text(weights), output.size_text(taken), f"{_bits(taken, weights):.2f}"
        output.add_row(made, name, len(group), *sizes, f"{taken / size:.1%}")
    return made


def _metadata_table(gguf: GGUFFile, full: bool) -> Any:
    made = output.table("key", "type", "value", title=f"Metadata ({len(gguf.fields)} keys)")
    for key, field in gguf.fields.items():
        kind = field.type.name.lower()
        if field.item_type is not None:
            kind = f"{field.item_type.name.lower()}[{len(field.value)}]"
        output.add_row(made, key, kind, _table_value(field, full))
    return made


def _tensor_table(tensors: list[TensorInfo]) -> Any:
    made = output.table("name", "format", "shape", "size", title=f"Tensors ({len(tensors)})", numbers=("shape", "size"))
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.shape))
        output.add_row(made, tensor.name, tensor.format, shape, output.size_text(tensor.nbytes))
    return made


def _table_value(field: Field, full: bool) -> str:
    if field.item_type is None:
        value = np.float32(field.value) if field.type is ValueType.FLOAT32 else field.value  # 1e-05, not 9.99...e-06
        return str(value) if full else one_line(str(value), 100)
    items = field.plain
    shown = items if full else items[:HEAD]
    texts = [repr(item) if isinstance(item, str) else str(item) for item in shown]
    more = ", ..." if len(items) > len(shown) else ""
    joined = ", ".join(texts) + more
    return joined if full else one_line(joined, 100)


def _json_value(field: Field, full: bool) -> Any:
    if field.item_type is None:
        return field.value
    items = field.value if full or len(field.value) <= WHOLE_ARRAY else field.value[:HEAD]
    if field.item_type is ValueType.ARRAY:
        items = [_json_value(item, full) for item in items]
    if len(items) == len(field.value):
        return items
    return {"type": f"array of {field.item_type.name.lower()}", "length": len(field.value), "head": items}


def _by_format(tensors: list[TensorInfo]) -> dict[str, list[TensorInfo]]:
    """Tensors by format, the format that takes most bytes first."""
    groups: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.format, []).append(tensor)
    return dict(sorted(groups.items(), key=lambda item: -_total(item[1])[1]))


def _total(tensors: list[TensorInfo]) -> tuple[int, int]:
    """Number of weights and of bytes."""
    return sum(math.prod(t.shape) for t in tensors), sum(t.nbytes for t in tensors)


def _bits(size: int, parameters: int) -> float | None:
    return 8 * size / parameters if parameters else None


def _text_or_none(gguf: GGUFFile, key: str) -> str | None:
    field = gguf.fields.get(key)
    return field.value if field is not None and isinstance(field.value, str) else None
