"""`realm convert-adapter`: a LoRA adapter from Hugging Face PEFT's form to llama.cpp's, or back."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from realm_jax.cli import output
from realm_jax.cli.adapters import report_skipped, skip_option
from realm_jax.cli.options import common_options, file_argument
from realm_jax.cli.text import one_line
from realm_jax.errors import AdapterError

if TYPE_CHECKING:
    from realm_jax.lora import Adapter


@click.command(name="convert-adapter")
@file_argument("source", "IN")
@file_argument("target", "OUT")
@click.option(
    "--base",
    metavar="MODEL",
    type=click.Path(path_type=Path),
    help="The base model: a GGUF file or a Hugging Face directory, of which only sizes are read; "
    "IN is checked against it.",
)
@click.option(
    "--dtype",
    type=click.Choice(("F32", "F16", "BF16")),
    default="F32",
    show_default=True,
    help="Type of the numbers in OUT.",
)
@skip_option
@common_options
def command(source: Path, target: Path, base: Path | None, dtype: str, skip_misfits: bool, as_json: bool) -> None:
    """Write the adapter IN as OUT: GGUF for llama.cpp where OUT ends in .gguf, else a PEFT directory.

    IN is a PEFT directory or an adapter GGUF. The rows of q and k are brought into the order of the new kind, for which
    the heads of the base model must be known: from --base, else from IN itself, else from the local model that IN
    names, else from the bundled model if IN fits that.
    """
    from realm_jax.lora import load_adapter, save_adapter
    from realm_jax.lora.adapter import check
    from realm_jax.lora.base import read_base
    from realm_jax.lora.files import is_gguf, missing_base

    adapter = load_adapter(source, strict=not skip_misfits)
    missing = missing_base(adapter, target)
    if base is None and missing:
        base = _guess_base(adapter)
        if base is None:
            raise AdapterError(f"{source}: {missing}, and no model is at hand that it fits: give it with --base")
    config = None if base is None else read_base(base)
    if config is not None:
        adapter = check(adapter, config, str(base), strict=not skip_misfits)
    report_skipped(adapter)
    save_adapter(adapter, target, base=config, dtype=dtype)
    if as_json:
        kind = "GGUF" if is_gguf(target) else "PEFT"
        about = {"in": str(source), "out": str(target), "kind": kind, "base": None if base is None else str(base)}
        about["architecture"] = config.architecture if config else adapter.architecture
        output.print_json(about | _facts(adapter, kind))
    count = sum(1 for _ in adapter.items())
    click.echo(one_line(f"{target}: {count} weights, rank {adapter.rank}, {dtype}"), err=True)


def _guess_base(adapter: "Adapter") -> Path | None:
    """The local model that the adapter names, else the bundled one if the adapter fits it."""
    from realm_jax.lora.adapter import check
    from realm_jax.lora.base import read_base
    from realm_jax.model.files import bundled

    named = Path(adapter.base or "")
    if (named / "config.json").is_file() or (named.suffix == ".gguf" and named.is_file()):
        return named
    try:
        check(adapter, read_base(bundled()))
    except AdapterError:
        return None
    return bundled()


def _facts(adapter: "Adapter", kind: str) -> dict:
    """What --json says of an adapter; alpha: the one in the new file, of most of its weights."""
    from realm_jax.lora.adapter_gguf import common_alpha
    from realm_jax.lora.peft import peft_config

    deltas = [delta for _, delta in adapter.items()]
    return {
        "rank": adapter.rank,
        "alpha": common_alpha(adapter) if kind == "GGUF" else peft_config(adapter)["lora_alpha"],
        "tensors": len(deltas),
        "dora": any(delta.magnitude is not None for delta in deltas),
        "skipped": list(adapter.skipped),
    }
