"""Tile sizes of the product by few rows, as data: `tiles.json`, by kind of device, format and class of shape. "Q4_K
int8" is the format Q4_K in int8 arithmetic.

`plan` and `triton_int8` ask `find`; experiments/tune_kernels.py measures and writes the file. REALM_TILES names a file
of the same form whose entries come before those of the package. What neither has is taken from the device "default",
and else from RULE or INT8_RULE. Rows of x are no key: the order in which a result is summed depends on the warps, and
must not depend on how many rows there are.
"""

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from realm_jax.errors import RealmError
from realm_jax.kernels import pallas
from realm_jax.quant.formats import FORMATS

PACKAGED = Path(__file__).with_name("tiles.json")
VARIABLE = "REALM_TILES"
DEFAULT = "default"  # the device that stands for all that have no entries, and for the interpreter
FEW_OUTPUTS = 8192  # at most: 512 programs, four for each multiprocessor of an H200
FEW_INPUTS = 6144  # at most: few steps for each warp
CLASSES = tuple(f"{n} outputs, {k} inputs" for n in ("few", "many") for k in ("few", "many"))


class Tiles(NamedTuple):
    """warps: that take turns along a row of w, at most; fewer where it has not enough for them. stages: of the ring
    that is read ahead. most_rows: of x, up to which the fused kernel serves; above it weights are dequantized first
    (`dense`). across: warps of a program that read x together where that is more than a tile, at most (but four where
    four multiply together, see `plan.wide`); 0: none do.
    """

    warps: int
    stages: int
    most_rows: int
    across: int


RULE = Tiles(warps=4, stages=2, most_rows=64, across=8)  # of what no file names
INT8_RULE = Tiles(warps=8, stages=2, most_rows=64, across=0)  # likewise, in int8 arithmetic: 64 rows, none across
ALLOWED = {
    "warps": ((1, 2, 4, 8, 16), "1, 2, 4, 8 or 16"),
    "stages": (range(2, 7), "2 to 6"),
    "most_rows": (range(64, 257), "64 to 256"),
    "across": ((0, 2, 4, 8), "0, 2, 4 or 8"),
}
Table = dict[str, dict[str, dict[str, Tiles]]]  # device kind -> format -> class of shape


def find(format: str, outputs: int, inputs: int, arithmetic: str = "float") -> Tiles:
    """The tile sizes for weights (outputs, inputs) of a block format on the device that is traced for.

    RealmError for a file of REALM_TILES that cannot be read or holds what is not allowed.
    """
    table, shape = _table(os.environ.get(VARIABLE, "")), shape_class(outputs, inputs)
    for device in dict.fromkeys((device_kind(), DEFAULT)):
        if found := table.get(device, {}).get(entry_name(format, arithmetic), {}).get(shape):
            return found
    return RULE if arithmetic == "float" else INT8_RULE


def entry_name(format: str, arithmetic: str) -> str:
    """What a file calls a format in "float" or "int8" arithmetic."""
    return format if arithmetic == "float" else f"{format} {arithmetic}"


def shape_class(outputs: int, inputs: int) -> str:
    """The one of CLASSES that weights (outputs, inputs) are in."""
    return CLASSES[2 * (outputs > FEW_OUTPUTS) + (inputs > FEW_INPUTS)]


def device_kind() -> str:
    """What JAX calls the device that is traced for ("NVIDIA H200"); "default" in the interpreter."""
    if pallas.interpreting():
        return DEFAULT
    chosen = getattr(jax.config.jax_default_device, "device_kind", None)  # also one that is compiled for, but not here
    return chosen or jax.devices()[0].device_kind


@functools.cache
def _table(path: str) -> Table:
    packaged = read(PACKAGED)
    return merged(packaged, read(Path(path))) if path else packaged


# --- files -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> Table:
    """The entries of a file. RealmError, naming the place, where it cannot be read or holds what is not allowed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RealmError(f"{path}: cannot read the tile sizes: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RealmError(f"{path}: not JSON: {error}") from error
    return {
        device: {name: _classes(entries, path, device, name) for name, entries in _items(formats, f"{path}: {device}")}
        for device, formats in _items(content, f"{path}")
    }


def _classes(entries: Any, path: Path, device: str, name: str) -> dict[str, Tiles]:
    where = f"{path}: {device}: {name}"
    if name.removesuffix(" int8") not in FORMATS:
        raise RealmError(f"{where}: no block format; known: {', '.join(FORMATS)}")
    for shape, _ in _items(entries, where):
        if shape not in CLASSES:
            raise RealmError(f"{where}: {shape}: no class of shape; known: {'; '.join(CLASSES)}")
    return {shape: checked(entry, f"{where}: {shape}") for shape, entry in entries.items()}


def _items(value: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise RealmError(f"{where}: want a table, not {value!r:.60}")
    return list(value.items())


def checked(entry: Any, where: str) -> Tiles:
    """An entry of a file as Tiles. RealmError, with the place in front, for a wrong key, type or number."""
    if not isinstance(entry, dict) or set(entry) != set(Tiles._fields):
        raise RealmError(f"{where}: want {', '.join(Tiles._fields)} and nothing else, not {entry!r:.80}")
    for key, (allowed, spoken) in ALLOWED.items():
        if type(entry[key]) is not int or entry[key] not in allowed:
            raise RealmError(f"{where}: {key} is {entry[key]!r:.20}; want {spoken}")
    return Tiles(**entry)


def merged(table: Mapping, over: Mapping) -> dict:
    """Both tables; where they have the same entry, that of `over`."""
    both = dict(table)
    for key, value in over.items():
        inner = isinstance(value, Mapping) and key in table
        both[key] = merged(table[key], value) if inner else value
    return both


def to_text(table: Table) -> str:
    """The table as the text of a file, sorted, an entry a line."""
    plain = {
        device: {
            name: {shape: tiles._asdict() for shape, tiles in sorted(entries.items())}
            for name, entries in sorted(formats.items())
        }
        for device, formats in sorted(table.items())
    }
    return re.sub(r"\{[^{}]+\}", lambda entry: " ".join(entry[0].split()), json.dumps(plain, indent=1)) + "\n"
