"""What became of a file that was quantized: by tensor, by format, and as a whole. Made by `files`, shown by the CLI."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from realm_jax.quantizer.encode import Errors


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the new file.

    before, after: its formats; the same where it was copied. instead_of: the format that was chosen, where the rows
    did not fit it. bytes_before, bytes_after: without padding. errors: None where it was copied.
    """

    name: str
    shape: tuple[int, ...]
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    instead_of: str | None = None
    errors: Errors | None = None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_after / self.weights


@dataclass(frozen=True)
class Totals:
    """Some tensors together.

    relative_error: mean squared error over mean square, of those that were not copied; None where all were.
    weighted_error: the same, weighted by importance, of those that had any.
    """

    tensors: int
    weights: int
    bytes_before: int
    bytes_after: int
    relative_error: float | None
    weighted_error: float | None

    @property
    def bits_per_weight(self) -> float | None:
        return 8 * self.bytes_after / self.weights if self.weights else None

    @classmethod
    def of(cls, tensors: Iterable[TensorReport]) -> "Totals":
        tensors = list(tensors)
        errors = [t.errors for t in tensors if t.errors is not None]
        weighted = [e for e in errors if e.weighted]
        return cls(
            tensors=len(tensors),
            weights=sum(t.weights for t in tensors),
            bytes_before=sum(t.bytes_before for t in tensors),
            bytes_after=sum(t.bytes_after for t in tensors),
            relative_error=sum(errors, Errors()).relative if errors else None,
            weighted_error=sum(weighted, Errors()).relative_weighted if weighted else None,
        )


@dataclass(frozen=True)
class Report:
    """A file that was quantized. format: the mix or format asked for. tensors: in file order."""

    source: str
    target: str
    format: str
    tensors: tuple[TensorReport, ...]
    warnings: tuple[str, ...]

    @property
    def totals(self) -> Totals:
        return Totals.of(self.tensors)

    def by_format(self) -> dict[str, Totals]:
        """Format of the new file -> its tensors together, the format that takes most bytes first."""
        groups: dict[str, list[TensorReport]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.after, []).append(tensor)
        totals = {name: Totals.of(group) for name, group in groups.items()}
        return dict(sorted(totals.items(), key=lambda item: -item[1].bytes_after))
