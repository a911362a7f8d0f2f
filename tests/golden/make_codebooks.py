"""Write realm_jax/quant/codebooks.json from the tables of the `gguf` package.

python tests/golden/make_codebooks.py
"""

import json
from pathlib import Path

import gguf
import numpy as np

PATH = Path(__file__).parents[2] / "realm_jax" / "quant" / "codebooks.json"
GRIDS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S")  # IQ1_M has the grid of IQ1_S
VALUES = ("IQ4_NL", "MXFP4")  # IQ4_XS and NVFP4 have the same
NUMBERS_A_LINE = 16


def tables() -> dict[str, dict]:
    """All codebooks as they stand in the file, from the tables of the `gguf` package."""
    books = {}
    for name in GRIDS:
        kind = getattr(gguf.quants, name)
        kind.init_grid()
        values = np.array(kind.grid_map)
        grid = kind.grid.reshape(kind.grid_shape)
        digits = np.argmax(grid[..., None] == values, -1)
        shifts = np.arange(grid.shape[1]) * int(len(values) - 1).bit_length()
        entries = (digits << shifts).sum(-1)
        books[name] = {"values": values.tolist(), "digits": grid.shape[1], "entries": entries.tolist()}
    for name in VALUES:
        books[name] = {"values": list(getattr(gguf.quants, name).kvalues), "digits": 0, "entries": []}
    return books


def lines(numbers: list[int]) -> str:
    """A JSON list of numbers, NUMBERS_A_LINE a line."""
    texts = [json.dumps(numbers[i : i + NUMBERS_A_LINE])[1:-1] for i in range(0, len(numbers), NUMBERS_A_LINE)]
    return "[" + ",\n  ".join(texts) + "]"


def make_text() -> str:
    """What `codebooks.json` must hold."""
    books = [
        f'"{name}": {{"digits": {book["digits"]}, "values": {lines(book["values"])},\n  "entries": '
        f"{lines(book['entries'])}}}"
        for name, book in tables().items()
    ]
    return "{\n" + ",\n".join(books) + "\n}\n"


if __name__ == "__main__":
    PATH.write_text(make_text(), encoding="utf-8")
