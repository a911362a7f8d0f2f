"""The tables of formats in README.md and docs/formats.md, made from `FORMATS` so that they cannot be wrong.

python -m realm_jax.quant.table                              print them
python -m realm_jax.quant.table README.md docs/formats.md    renew what stands between their markers
"""

import sys
from pathlib import Path

import jax
import numpy as np

from realm_jax.quant.formats import DENSE_FORMATS, FORMATS
from realm_jax.quant.layout import Field, Format

BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"


def formats_table() -> str:
    """What each format is: one row a format."""
    lines = [
        "| format | bits a weight | weights a block | bytes a block | sub-blocks | a weight is | encoder |",
        "|---|--:|--:|--:|---|---|---|",
    ]
    for name, dtype in DENSE_FORMATS.items():
        lines.append(f"| {name} | {8 * dtype.itemsize} | 1 | {dtype.itemsize} | | a plain {dtype.name} array | yes |")
    for kind in FORMATS.values():
        codes, scale, offset = _decoded(kind)
        sub_blocks = f" {scale.shape[-1]} of {codes.shape[-1]}" if scale.shape[-1] > 1 else ""
        meaning = "scale * code" + (" + offset" if offset is not None else "")
        encoder = "yes" if kind.encode else "not yet"
        lines.append(
            f"| {kind.name} | {kind.bits_per_weight:g} | {kind.block_size} | {kind.block_bytes} |{sub_blocks} "
            f"| {meaning} | {encoder} |"
        )
    return "\n".join(lines)


def planes_table() -> str:
    """The planes of each format: dtype and shape after the row axes, for rows of G blocks."""
    lines = ["| format | planes of a row of G blocks |", "|---|---|"]
    for kind in FORMATS.values():
        lines.append(f"| {kind.name} | {', '.join(_plane(field) for field in kind.fields)} |")
    return "\n".join(lines)


def _decoded(kind: Format) -> jax.ShapeDtypeStruct:
    """The shapes that `decode` gives for one row of one block."""
    planes = {f.name: jax.ShapeDtypeStruct((1, *f.tail(1)), f.dtype) for f in kind.fields}
    return jax.eval_shape(kind.decode, planes)


def _plane(field: Field) -> str:
    chunks = f"{field.chunks} G" if field.chunks > 1 else "G"
    shape = f"({chunks} / n, {field.words}, n)" if field.words else f"({chunks})"
    floats = f" = {' & '.join(field.floats)}" if len(field.floats) > 1 else ""
    return f"`{field.name}` {np.dtype(field.dtype).name} {shape}{floats}"


TABLES = {"formats": formats_table, "planes": planes_table}


def renew(text: str) -> str:
    """The text with the right table between each pair of markers `<!-- formats:begin -->`, `<!-- formats:end -->`."""
    for name, table in TABLES.items():
        begin, end = BEGIN.format(name), END.format(name)
        if begin in text:
            before, rest = text.split(begin, 1)
            text = f"{before}{begin}\n{table()}\n{end}{rest.split(end, 1)[1]}"
    return text


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        path.write_text(renew(path.read_text(encoding="utf-8")), encoding="utf-8")
    if not paths:
        print("\n\n".join(table() for table in TABLES.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
