"""`realm merge`: an adapter merged into the weights of a model, every tensor back in its own format."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from realm_jax.cli import output
from realm_jax.cli.adapters import load_adapters, skip_option
from realm_jax.cli.divergence import divergence_json, divergence_rows
from realm_jax.cli.options import common_options, file_argument, pre_option
from realm_jax.cli.quantize import METHOD_NAMES
from realm_jax.cli.text import one_line, read_text_file
from realm_jax.gguf.reader import open_gguf
from realm_jax.gguf.writer import check_target

if TYPE_CHECKING:
    import numpy as np

    from realm_jax.lora import Adapter
    from realm_jax.model import Model
    from realm_jax.quantizer import MergeReport
    from realm_jax.quantizer.encode import Errors

    Entries = list[tuple[Adapter, float]]

DEFAULT_CONTEXT = 512  # of the chunks of a text, as `realm perplexity` has it


@click.command(name="merge")
@file_argument("model", "MODEL")
@file_argument("adapter", "ADAPTER")
@file_argument("out", "OUT.gguf")
@click.option("--scale", type=float, default=1.0, show_default=True, help="Multiplies the adapter's own scale.")
@click.option(
    "--format",
    "format_name",
    metavar="NAME",
    help="Format for the tensors that change, as Q8_0 or F16, in place of the one that each has.",
)
@click.option(
    "--method",
    type=click.Choice(METHOD_NAMES),
    default=METHOD_NAMES[0],
    show_default=True,
    help="Which error the codes are searched for; see docs/quantization.md.",
)
@click.option("--imatrix", metavar="FILE", type=click.Path(path_type=Path), help="llama.cpp's importance matrix.")
@click.option(
    "--text",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Text to measure on. Default: what the model with its adapter says of itself.",
)
@click.option("--no-report", is_flag=True, help="Do not measure the merged model against the unmerged one.")
@skip_option
@pre_option
@common_options
def command(
    model: Path,
    adapter: Path,
    out: Path,
    scale: float,
    format_name: str | None,
    method: str,
    imatrix: Path | None,
    text: Path | None,
    no_report: bool,
    skip_misfits: bool,
    pre: str | None,
    as_json: bool,
) -> None:
    """Merge ADAPTER into MODEL and write OUT.gguf.

    Every tensor that the adapter changes goes back into its own format; all others are copied byte for byte. The report
    says how far the merged model is from the model with its adapter beside it, and how far one would be that was merged
    into F16 and quantized again as a whole.
    """
    if text and no_report:
        raise click.UsageError("--text is for the report: leave out --no-report")
    from realm_jax.model import load, save
    from realm_jax.quantizer import merge_report, read_imatrix, weight_errors

    _check_target(model, out)
    encoding = {"method": method, "imatrix": read_imatrix(imatrix) if imatrix else None}
    words = read_text_file(text).removesuffix("\n") if text else None
    with output.waiting("loading the model"):
        loaded = load(model, pre=pre)
        acting = load_adapters(loaded, [(adapter, scale)], skip_misfits)
    chunks = None if words is None else _chunks(loaded, words)
    merged = _merge(loaded, acting, format=format_name, **encoding)
    save(merged, out)
    with output.waiting("measuring"):
        report = None if no_report else merge_report(loaded, acting, merged, chunks, **encoding)
        errors = report.tensors if report else weight_errors(loaded, acting, merged)
    tensors = _tensors(loaded, merged, errors)
    if as_json:
        shown = {"model": str(model), "adapter": str(adapter), "out": str(out), "scale": scale, "tensors": tensors}
        shown |= {"report": report and _report_json(report, text), "skipped": acting[0][0].skipped}
        output.print_json(shown)
        return
    _show(tensors, report)
    click.echo(one_line(f"{out}: {len(tensors)} tensors merged, {output.size_text(out.stat().st_size)}"), err=True)


def _check_target(model: Path, out: Path) -> None:
    """Refuses, before any work, an OUT that cannot be written or is MODEL itself."""
    from realm_jax.quantizer.files import refuse_own_file

    with open_gguf(model) as file:
        refuse_own_file(file, out, "merged")
    check_target(out)


def _merge(model: "Model", acting: "Entries", **how: Any) -> "Model":
    from realm_jax.quantizer import merge

    with output.progress() as bar:
        task = bar.add_task("tensors", total=None)
        return merge(model, acting, on_tensor=lambda _, total: bar.update(task, advance=1, total=total), **how)


def _chunks(model: "Model", words: str) -> "np.ndarray":
    from realm_jax.evaluate import text_chunks

    return text_chunks(model, words, min(DEFAULT_CONTEXT, model.config.context_length))


def _tensors(model: "Model", merged: "Model", errors: "dict[str, Errors]") -> list[dict[str, Any]]:
    """What became of each tensor that the adapter changes."""
    from realm_jax.lora.adapter import weight_of
    from realm_jax.model.params import tensor_specs
    from realm_jax.quantizer.models import format_of

    paths = {spec.name: spec.path for spec in tensor_specs(model.config)}
    found = []
    for name, error in errors.items():
        before, after = (format_of(weight_of(m.params, paths[name])) for m in (model, merged))
        found.append({"name": name, "from": before, "to": after, "relative_error": error.relative})
    return found


def _report_json(report: "MergeReport", text: Path | None) -> dict[str, Any]:
    other, gain = report.through_f16, report.gain
    return {
        "text": text and str(text),
        "chunks": report.chunks,
        "context": report.context,
        "tokens": report.tokens,
        "merged": divergence_json(report.merged),
        "through_f16": other and divergence_json(other),
        "no_f16": report.no_f16,
        "gain": gain and gain.mean,
        "gain_error": gain and gain.error,
    }


def _show(tensors: list[dict[str, Any]], report: "MergeReport | None") -> None:
    screen = output.console(sys.stdout)
    made = output.table("tensor", "from", "to", "relative error", title="Tensors", numbers=("relative error",))
    for tensor in tensors:
        output.add_row(made, tensor["name"], tensor["from"], tensor["to"], f"{tensor['relative_error']:.3e}")
    screen.print(made)
    if report is None:
        return
    columns = ["merged", "error"] + (["through F16", "error"] if report.through_f16 else [])
    made = output.table("from the unmerged model", *columns, title="Report", numbers=tuple(columns))
    rows = divergence_rows(report.merged)
    others = divergence_rows(report.through_f16) if report.through_f16 else [()] * len(rows)
    for row, other in zip(rows, others, strict=True):
        output.add_row(made, *row, *other[1:])
    if report.gain:
        output.add_row(made, "KL saved", f"{report.gain.mean:.4g}", f"{report.gain.error:.4g}", "", "")
    screen.print("", made, sep="\n")
    note = f"not compared with merging through F16: {report.no_f16}" if report.no_f16 else ""
    scored = f"{report.tokens} tokens scored in {report.chunks} chunks of {report.context}"
    click.echo("\n".join(one_line(line) for line in (scored, note) if line), err=True)
