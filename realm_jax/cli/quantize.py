"""`realm quantize`: a GGUF file in another format, with llama.cpp's mixes, rules of one's own, and importance."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from realm_jax.cli import output
from realm_jax.cli.options import common_options, file_argument, pre_option
from realm_jax.cli.text import one_line, read_text_file

if TYPE_CHECKING:
    from realm_jax.quantizer import Imatrix, Report, TensorReport, Totals

DEFAULT_CONTEXT = 512  # llama-imatrix's
METHOD_NAMES = ("refine", "mse", "search")  # those of realm_jax.quant.METHODS, default first, known without JAX

HELP = """Write IN.gguf to OUT.gguf with its weights in another format.

\b
NAME is one of
  a mix of llama.cpp's: Q2_K, Q3_K_S, Q3_K_M, Q3_K_L, Q4_K_S, Q4_K_M,
    Q5_K_S, Q5_K_M, Q6_K, Q2_K_S, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ1_S,
    IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ2_M, IQ3_XXS, IQ3_XS, IQ3_S, IQ3_M,
    IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, F16, BF16, F32: every tensor gets what
    llama-quantize gives it (with --pure, all matrices get one format);
  a format that is no file type of llama.cpp's: Q3_K, Q4_K, Q5_K, Q8_1,
    Q8_K, MXFP4, NVFP4: all matrices get it (llama-quantize takes Q3_K,
    Q4_K and Q5_K as other names of the _M mixes);
  COPY: nothing changes but what --keep says.

Vectors, norms and routers stay as they are. Rows that the blocks of a format do not divide get the substitute that
llama.cpp gives them. Not every format can be encoded yet; one that cannot is refused before anything is written.
"""


def _parse_rules(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, str]]:
    rules = []
    for value in values:
        pattern, _, format = value.rpartition("=")
        if not pattern or not format:
            raise click.BadParameter(f"{value!r} is not PATTERN=FORMAT, as in 'blk.*.attn_v.weight=Q6_K'")
        rules.append((pattern, format))
    return rules


@click.command(name="quantize", help=HELP)
@file_argument("source", "IN.gguf")
@file_argument("target", "OUT.gguf")
@click.option("--format", "format_name", required=True, metavar="NAME", help="Mix or format of the new file.")
@click.option(
    "--keep",
    multiple=True,
    callback=_parse_rules,
    metavar="PATTERN=FORMAT",
    help="Format of the tensors whose names fit a pattern (*, ?, [...]), or COPY to leave them as they are. "
    "May be repeated: the first that fits wins.",
)
@click.option("--pure", is_flag=True, help="No mix: one format for all matrices.")
@click.option("--imatrix", metavar="FILE", type=click.Path(path_type=Path), help="llama.cpp's importance matrix.")
@click.option(
    "--calibrate",
    metavar="TEXTFILE",
    type=click.Path(path_type=Path),
    help="Measure the importance: run IN.gguf over this text first.",
)
@click.option(
    "--context",
    metavar="N",
    type=click.IntRange(min=3),
    help=f"Tokens a chunk of that text. Default: {DEFAULT_CONTEXT}, or the model's own if that is less.",
)
@click.option(
    "--batch", metavar="N", type=click.IntRange(min=1), help="Chunks at once (default: as memory allows, up to 8)."
)
@click.option("--process-output", is_flag=True, help="Measure the output matrix too.")
@click.option(
    "--save-imatrix",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Keep what was measured, in llama.cpp's format (GGUF).",
)
@click.option(
    "--method",
    type=click.Choice(METHOD_NAMES),
    default=METHOD_NAMES[0],
    show_default=True,
    help="Which error the codes are searched for; see docs/quantization.md.",
)
@pre_option
@common_options
def command(
    source: Path,
    target: Path,
    format_name: str,
    keep: list[tuple[str, str]],
    pure: bool,
    imatrix: Path | None,
    method: str,
    as_json: bool,
    **calibration: Any,
) -> None:
    _check_usage(imatrix, calibration)
    from realm_jax.quantizer import quantize_file, read_imatrix
    from realm_jax.quantizer.files import check_quantization

    importance = read_imatrix(imatrix) if imatrix else None
    if calibration["calibrate"]:  # may take long: what is wrong should show before
        check_quantization(source, target, format_name, keep=keep, method=method, pure=pure)
        importance = _calibrate(source, **calibration)
    started = time.perf_counter()
    with output.progress() as bar:
        task = bar.add_task("tensors", total=None)
        report = quantize_file(
            source,
            target,
            format_name,
            keep=keep,
            imatrix=importance,
            method=method,
            pure=pure,
            on_tensor=lambda _, total: bar.update(task, advance=1, total=total),
            on_warning=lambda text: click.echo(f"warning: {one_line(text)}", err=True),
        )
    seconds = time.perf_counter() - started
    if as_json:
        output.print_json(_as_json(report, importance, seconds))
    else:
        _show(report, seconds)


def _check_usage(imatrix: Path | None, calibration: dict[str, Any]) -> None:
    if imatrix and calibration["calibrate"]:
        raise click.UsageError("give either --imatrix or --calibrate")
    for name in ("context", "batch", "process_output", "save_imatrix", "pre"):
        if calibration[name] and not calibration["calibrate"]:
            raise click.UsageError(f"--{name.replace('_', '-')} is for --calibrate: give that too")


def _calibrate(
    source: Path,
    calibrate: Path,
    context: int | None,
    batch: int | None,
    process_output: bool,
    save_imatrix: Path | None,
    pre: str | None,
) -> "Imatrix":
    """Measures the importance and writes it where that is asked for; the model is gone from memory afterwards."""
    text = read_text_file(calibrate)
    from realm_jax.evaluate import text_chunks
    from realm_jax.model import load
    from realm_jax.quantizer.calibrate import measure_inputs
    from realm_jax.quantizer.imatrix import write_imatrix

    with output.waiting("loading the model"):
        model = load(source, pre=pre)
    chunks = text_chunks(model, text, context or min(DEFAULT_CONTEXT, model.config.context_length))
    with output.progress() as bar:
        task = bar.add_task("calibrating", total=len(chunks))
        measured = measure_inputs(
            model, chunks, batch=batch, on_chunks=lambda count: bar.advance(task, count), output=process_output
        )
    measured = dataclasses.replace(measured, datasets=(str(calibrate),), source=str(save_imatrix or ""))
    if save_imatrix:
        write_imatrix(save_imatrix, measured)
    return measured


def _as_json(report: "Report", imatrix: "Imatrix | None", seconds: float) -> dict[str, Any]:
    about = None
    if imatrix is not None:
        about = {"file": imatrix.source or None, "entries": len(imatrix.values), "chunks": imatrix.chunks}
        about |= {"chunk_size": imatrix.chunk_size, "datasets": imatrix.datasets}
    return {
        "source": report.source,
        "target": report.target,
        "format": report.format,
        "seconds": seconds,
        "warnings": report.warnings,
        "imatrix": about,
        **_totals_json(report.totals),
        "formats": {name: _totals_json(totals) for name, totals in report.by_format().items()},
        "tensors": [_tensor_json(tensor) for tensor in report.tensors],
    }


def _totals_json(totals: "Totals") -> dict[str, Any]:
    return {
        "weights": totals.weights,
        "bytes_before": totals.bytes_before,
        "bytes": totals.bytes_after,
        "bits_per_weight": totals.bits_per_weight,
        "relative_error": totals.relative_error,
        "weighted_error": totals.weighted_error,
    }


def _tensor_json(tensor: "TensorReport") -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": tensor.shape,
        "from": tensor.before,
        "to": tensor.after,
        "instead_of": tensor.instead_of,
        "bytes": tensor.bytes_after,
        "bits_per_weight": tensor.bits_per_weight,
        "relative_error": tensor.errors.relative if tensor.errors else None,
        "weighted_error": tensor.errors.relative_weighted if tensor.errors else None,
    }


def _show(report: "Report", seconds: float) -> None:
    screen = output.console(sys.stdout)
    numbers = ("bits a weight", "relative error", "weighted error")
    made = output.table("tensor", "from", "to", *numbers, title="Tensors", numbers=numbers)
    for t in report.tensors:
        errors = (_error(t.errors.relative), _error(t.errors.relative_weighted)) if t.errors else ("", "")
        after = f"{t.after} (not {t.instead_of})" if t.instead_of else t.after
        output.add_row(made, t.name, t.before, after, f"{t.bits_per_weight:.4g}", *errors)
    screen.print(made, "", sep="\n")
    numbers = ("tensors", "weights", "size", *numbers)
    made = output.table("format", *numbers, title="Formats", numbers=numbers)
    for name, totals in (*report.by_format().items(), ("all", report.totals)):
        sizes = output.count_text(totals.weights), output.size_text(totals.bytes_after)
        bits = "" if totals.bits_per_weight is None else f"{totals.bits_per_weight:.4g}"
        errors = _error(totals.relative_error), _error(totals.weighted_error)
        output.add_row(made, name, totals.tensors, *sizes, bits, *errors)
    screen.print(made)
    before, after = (output.size_text(n) for n in (report.totals.bytes_before, report.totals.bytes_after))
    click.echo(one_line(f"{report.target}: {report.format}, {before} -> {after}; {seconds:.1f} s"), err=True)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.3e}"
