"""One tensor of an open file on its way to another format, in stripes of rows. Called by `files`.

Shapes: M matrices (1, or the experts of a stack), N rows, K weights in a row.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from realm_jax import quant
from realm_jax.errors import GGUFError, RealmError
from realm_jax.gguf.reader import GGUFFile
from realm_jax.gguf.types import TYPE_BY_NAME, TensorInfo, file_error, shown
from realm_jax.quantizer.encode import Errors, encode
from realm_jax.quantizer.mixes import Choice
from realm_jax.quantizer.report import TensorReport

# About so many weights are unpacked at a time: 4 MiB of float32 on a CPU, where more is no faster; a GPU wants work.
STRIPE_WEIGHTS, GPU_STRIPE_WEIGHTS = 1 << 20, 1 << 25
STRIPE_BYTES = 1 << 22  # copied at a time


@dataclass(frozen=True)
class Job:
    """A tensor and what is to become of it. importance_MK: float32, or None."""

    file: GGUFFile
    info: TensorInfo
    choice: Choice
    importance_MK: np.ndarray | None
    method: str
    done: Callable[[TensorReport], None]

    @property
    def copies(self) -> bool:
        return self.choice.format == self.info.format

    def produce(self) -> Iterator[np.ndarray]:
        """The bytes of the tensor in its new format, uint8, piece by piece; `done` is called after the last.

        Pages of the source are let go as they are used. Raises GGUFError, naming file and tensor, for weights that
        are not finite or that the format cannot hold.
        """
        errors, written = None, 0
        for piece, error in self._copied() if self.copies else self._quantized():
            written += piece.nbytes
            if error is not None:
                errors = error if errors is None else errors + error
            yield piece
            del piece
            self.file.release(self.info.name)
        info = self.info
        self.done(
            TensorReport(
                name=info.name,
                shape=info.shape,
                before=info.format,
                after=self.choice.format,
                bytes_before=info.nbytes,
                bytes_after=written,
                instead_of=self.choice.instead_of,
                errors=errors,
            )
        )

    def _copied(self) -> Iterator[tuple[np.ndarray, None]]:
        block = TYPE_BY_NAME[self.info.format].block_bytes
        step = STRIPE_BYTES // block * block
        for start in range(0, self.info.nbytes, step):
            piece = self.file.raw(self.info.name).reshape(-1)[start : start + step]
            if self.info.format in (*quant.FORMATS, *quant.DENSE_FORMATS):  # others come out as they are
                self._check_finite(piece, start // block)
            yield piece, None

    def _quantized(self) -> Iterator[tuple[np.ndarray, Errors]]:
        info = self.info
        rows, width = info.shape[-2:]
        kind = TYPE_BY_NAME[info.format]
        for matrices, part in _stripes(math.prod(info.shape[:-2]), rows, width):
            raw_MNB = self.file.raw(info.name).reshape(-1, rows, kind.row_bytes(width))[matrices, part]
            self._check_finite(raw_MNB, (matrices.start * rows + part.start) * width // kind.block_size)
            importance_M1K = None if self.importance_MK is None else self.importance_MK[matrices, None]
            yield self._encode(raw_MNB, importance_M1K)

    def _encode(self, raw_MNB: np.ndarray, importance_M1K: np.ndarray | None) -> tuple[np.ndarray, Errors]:
        w_MNK = quant.dequantize(raw_MNB, self.info.format, (*raw_MNB.shape[:2], self.info.shape[-1]))
        try:
            quantized = encode(w_MNK, self.choice.format, importance_M1K, self.method)
        except RealmError as error:
            raise file_error(self.file.path, f"tensor {shown(self.info.name)}: {error}") from None
        return quant.raw_bytes(quantized)[1], Errors.between(w_MNK, quantized, importance_M1K)

    def _check_finite(self, raw: np.ndarray, first: int) -> None:
        """first: number of the first block (of the first value, for dense formats) of `raw` in the tensor."""
        bad = quant.check_finite(raw, self.info.format)
        if bad is not None:
            raise self._not_finite(first + bad)

    def _not_finite(self, index: int) -> GGUFError:
        dense = self.info.format in quant.DENSE_FORMATS
        where = f"value {index:,} is" if dense else f"block {index:,} holds"
        what = "NaN or infinite" if dense else "NaN or infinity as its scale"
        return file_error(
            self.file.path,
            f"tensor {shown(self.info.name)} ({self.info.format}) is not finite: {where} {what}; "
            "every weight must be finite",
        )


def _stripes(matrices: int, rows: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Which matrices and which of their rows, one stripe after another: several whole matrices, or rows of one."""
    weights = STRIPE_WEIGHTS if jax.default_backend() == "cpu" else GPU_STRIPE_WEIGHTS
    at_once, step = max(1, weights // (rows * width)), min(rows, max(1, weights // width))
    for first in range(0, matrices, at_once):
        for start in range(0, rows, step):
            yield slice(first, first + at_once), slice(start, start + step)
