"""GGUF files quantized, whatever their architecture, with never more than a stripe of a tensor in float32.

`realm quantize` calls `quantize_file`. What a tensor becomes is decided in `mixes`; how it is read, encoded and
measured stands in `stream`.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from realm_jax import quant
from realm_jax.errors import RealmError
from realm_jax.gguf.reader import GGUFFile, open_gguf
from realm_jax.gguf.types import TYPE_BY_NAME, file_error, shown
from realm_jax.gguf.writer import write_gguf
from realm_jax.quantizer.encode import encode
from realm_jax.quantizer.imatrix import Imatrix
from realm_jax.quantizer.metadata import quantized_fields
from realm_jax.quantizer.mixes import COPY, Choice, Rules, plan_formats, resolve_name, wants_imatrix
from realm_jax.quantizer.report import Report, TensorReport
from realm_jax.quantizer.stream import Job

Plan = Mapping[str, Choice]
Importance = Mapping[str, np.ndarray]  # tensor name -> float32 (matrices, K)


def quantize_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: str,
    *,
    keep: Rules = (),
    imatrix: Imatrix | None = None,
    method: str = quant.DEFAULT_METHOD,
    pure: bool = False,
    on_tensor: Callable[[TensorReport, int], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Report:
    """Writes `target`: the GGUF file `source` (all files of a split one) with its tensors in other formats.

    format: a mix, a format for all matrices, or "COPY". keep: rules (pattern, format) that go before it. pure: one
    format for all matrices in place of a mix. See `choose_formats`. imatrix: importance of the columns. method: of
    `realm_jax.quant.quantize`. on_tensor: called with the report of each tensor that is done
    and the number of all. on_warning: called before the work begins with each line of `Report.warnings`.

    A tensor that stays in its format comes out byte for byte, whatever that format is. Metadata is kept, but for what
    llama-quantize sets in it. `target` appears when it is complete. Raises RealmError, one line that names file and
    tensor, for what cannot be done; before the work begins where that can be known.
    """
    name = resolve_name(format)
    with open_gguf(source) as file:
        refuse_own_file(file, Path(target))
        plan, importance = _prepare(file, name, keep, imatrix, method, pure)
        warnings = tuple(_warnings(file, name, plan, importance, imatrix))
        for warning in warnings if on_warning else ():
            on_warning(warning)
        reports: list[TensorReport] = []

        def done(report: TensorReport) -> None:
            reports.append(report)
            if on_tensor:
                on_tensor(report, len(plan))

        jobs = [Job(file, file.tensors[n], plan[n], importance.get(n), method, done) for n in plan]
        work = [(job.info.name, job.choice.format, job.info.shape, job.produce) for job in jobs]
        write_gguf(target, quantized_fields(file.fields, name, imatrix), work, alignment=file.alignment)
    return Report(str(source), str(target), name, tuple(reports), warnings)


def check_quantization(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: str,
    *,
    keep: Rules = (),
    method: str = quant.DEFAULT_METHOD,
    pure: bool = False,
) -> None:
    """Raises what `quantize_file` would raise before it begins to work; for callers that calibrate first."""
    with open_gguf(source) as file:
        refuse_own_file(file, Path(target))
        _prepare(file, resolve_name(format), keep, None, method, pure)


def _prepare(
    file: GGUFFile, name: str, keep: Rules, imatrix: Imatrix | None, method: str, pure: bool
) -> tuple[Plan, Importance]:
    """What every tensor becomes, and the importance of those that have any; checked as far as that goes."""
    tensors = {n: (info.format, info.shape) for n, info in file.tensors.items()}
    plan = plan_formats(name, file.metadata, tensors, keep=keep, has_imatrix=imatrix is not None, pure=pure)
    importance = _importance(file, plan, imatrix)
    _check_formats(file, plan, importance, method)
    return plan, importance


def refuse_own_file(file: GGUFFile, target: Path, done: str = "quantized") -> None:
    """Raises GGUFError where the file to be written is the one that is read. done: what becomes of it, for that."""
    try:
        same = any(os.path.samefile(path, target) for path in file.paths)
    except OSError:  # there is no such file yet, or the writer will say what is wrong with its name
        return
    if same:
        raise file_error(target, f"is the file to be {done}: give the new file another name")


def _changed(file: GGUFFile, plan: Plan) -> Iterator[tuple[str, str, str]]:
    """(name, format before, format after) of the tensors that are not copied."""
    for name, choice in plan.items():
        before = file.tensors[name].format
        if choice.format != before:
            yield name, before, choice.format


def _importance(file: GGUFFile, plan: Plan, imatrix: Imatrix | None) -> dict[str, np.ndarray]:
    """The importance of every tensor that will be encoded in blocks and has an entry of the right length."""
    if imatrix is None:
        return {}
    if not imatrix.values.keys() & file.tensors.keys():
        raise RealmError(
            f"none of the {len(imatrix.values)} entries of the importance matrix is for a tensor of {file.path}: "
            "was it made with another model?"
        )
    blocks = [name for name, _, after in _changed(file, plan) if after not in quant.DENSE_FORMATS]
    found = {name: imatrix.importance(name, file.tensors[name].shape) for name in blocks}
    return {name: values for name, values in found.items() if values is not None}


def _check_formats(file: GGUFFile, plan: Plan, importance: Importance, method: str) -> None:
    """Refuses formats that cannot be read or written, before hours of work: one block of zeros is encoded in each."""
    tried: set[tuple[str, bool]] = set()
    for name, before, after in _changed(file, plan):
        try:
            if before not in quant.DENSE_FORMATS:
                quant.get_format(before)
            if (after, name in importance) in tried:
                continue
            block = np.zeros((1, TYPE_BY_NAME[after].block_size), np.float32)
            encode(block, after, np.ones_like(block[0]) if name in importance else None, method)
            tried.add((after, name in importance))
        except RealmError as error:
            raise file_error(
                file.path,
                f"tensor {shown(name)} cannot become {after} from {before}: {error}; {COPY} leaves it as it is",
            ) from None


def _warnings(
    file: GGUFFile, format: str, plan: Plan, importance: Importance, imatrix: Imatrix | None
) -> Iterator[str]:
    changed = list(_changed(file, plan))
    again = [before for _, before, after in changed if before not in quant.DENSE_FORMATS]
    if again:
        yield (
            f"{len(again)} of {len(plan)} tensors are quantized already ({_counted(again)}): quantizing them again "
            "loses more than quantizing the original model"
        )
    substitutes = [f"{choice.format} for {choice.instead_of}" for choice in plan.values() if choice.instead_of]
    if substitutes:
        yield f"{len(substitutes)} tensors have rows that are not whole blocks: {_counted(substitutes)}"
    blind = [name for name, _, after in changed if name not in importance and wants_imatrix(format, name, after)]
    if blind:
        yield (
            f"{len(blind)} tensors get so few bits that llama-quantize would demand an importance matrix for them: "
            f"{_listed(blind)}"
        )
    if imatrix is not None:
        blocks = [name for name, _, after in changed if after not in quant.DENSE_FORMATS]
        without = [name for name in blocks if name not in importance]
        if without:
            yield f"{len(without)} tensors have no entry in the importance matrix: {_listed(without)}"
        strangers = [name for name in imatrix.values if name not in file.tensors]
        if strangers:
            yield f"{len(strangers)} entries of the importance matrix are for no tensor: {_listed(strangers)}"


def _counted(items: Iterable[str]) -> str:
    return ", ".join(f"{count} {item}" for item, count in Counter(items).most_common())


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
