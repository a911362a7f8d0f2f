"""Adapters from and to files: Hugging Face PEFT directories and llama.cpp's adapter GGUF. Called by users and the CLI.

The two kinds order the rows of q and k differently (see `lora.row_order`): a loaded adapter says which order it has,
`lora.fit` and `save_adapter` bring it into the one that is wanted.
"""

import contextlib
import ctypes
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np

from realm_jax.errors import AdapterError
from realm_jax.gguf.types import shown, shown_path
from realm_jax.lora.adapter import Adapter, Path, build_deltas, check, fit, logger
from realm_jax.lora.adapter_gguf import read_adapter_gguf, write_adapter_gguf
from realm_jax.lora.misfit import gguf_name
from realm_jax.lora.peft import CONFIG, WEIGHTS, read_peft, write_peft
from realm_jax.lora.row_order import to_ggml_rows, to_hf_rows
from realm_jax.model.config import ARCHITECTURES, Config
from realm_jax.model.model import Model
from realm_jax.quant import DENSE_FORMATS

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_adapter(path: str | os.PathLike, model: Model | None = None, *, strict: bool = True) -> Adapter:
    """The adapter in a PEFT directory or in an adapter GGUF file; with a model, fitted to it.

    Numbers are float32, to which F16 and BF16 widen exactly; a GGUF's blocks are dequantized. What is of no use here (a
    tensor for no weight that an adapter can change, modules saved whole) is an error, or, where `strict` is false, left
    out: `Adapter.skipped` and warnings of the logger "realm_jax" say so, a line each. An adapter does not remember
    that it was loaded so: fit it with `strict=False` too. Copies of embeddings that PEFT saves beside an adapter
    for them are ignored. Raises AdapterError, one line that names file and tensor or key, for whatever is broken,
    contradictory or not supported, and as `fit` does.
    """
    path = FilePath(path)
    skipped: list[str] = []
    try:
        read = read_peft if path.is_dir() else read_adapter_gguf
        if path.suffix in PICKLES and not path.is_dir():
            raise AdapterError(
                f"{shown_path(path)}: is a pickle, which may run any program and is never opened: use safetensors"
            )
        if path.name in (CONFIG, WEIGHTS) and path.is_file():
            raise AdapterError(f"{shown_path(path)}: is one of the two files of an adapter: give their folder")
        adapter = read(path, strict, skipped.append)
    except OSError as error:
        raise AdapterError(f"{shown_path(path)}: cannot be read: {error.strerror or error}") from None
    for line in skipped:
        logger.warning("%s: left out: %s", adapter.source, line)
    adapter = adapter.replace(skipped=tuple(skipped))
    return adapter if model is None else fit(adapter, model, strict=strict)


def save_adapter(
    adapter: Adapter, path: str | os.PathLike, *, base: Model | Config | None = None, dtype: str = "F32"
) -> None:
    """Writes an adapter: as GGUF for llama.cpp where the path ends in ".gguf", else as a PEFT directory.

    dtype: F32, F16 or BF16. base: the model that it is for, or its config; needed where the adapter does not know its
    architecture (GGUF) or heads (q and k of llama from one kind of file to the other), and checked against. What was
    loaded from one kind and saved as the other holds the same numbers, with two exceptions: GGUF has one alpha for all,
    so `b` of weights whose scale is another one is multiplied; and a scale for which there is no float32 alpha moves by
    its last bit. PEFT files keep every scale, rsLoRA's as a plain alpha. (llama.cpp cannot change embedding or
    output head of a model that ties them: it refuses an adapter for the latter and aborts on one for the former.)

    The file, or the directory, appears whole or not at all; a PEFT directory of that name is replaced, and other files
    in it are kept. Raises AdapterError, one line, for a stack, DoRA in a GGUF, what is missing of the base, numbers
    that the dtype cannot hold, and a path that is something else; GGUFError where the disk refuses a GGUF.
    """
    path = FilePath(path)
    as_gguf = is_gguf(path)
    if dtype not in DENSE_FORMATS:
        raise AdapterError(f"dtype is {shown(str(dtype))}; adapters are saved in {', '.join(DENSE_FORMATS)}")
    if base is not None:
        config = base.config if isinstance(base, Model) else base
        adapter = check(adapter, config).replace(
            architecture=config.architecture, heads=(config.heads, config.kv_heads)
        )
    _check_savable(adapter, as_gguf)
    missing = missing_base(adapter, path)
    if missing:
        raise AdapterError(f"{adapter.source}: {missing}: give its base model, which says it")
    adapter = _reordered(adapter, "ggml" if as_gguf else "hf")
    if as_gguf:
        write_adapter_gguf(adapter, path, DENSE_FORMATS[dtype], _cast(adapter.source))
        return
    try:
        with _new_directory(path) as folder:
            write_peft(adapter, folder, DENSE_FORMATS[dtype], _cast(adapter.source))
    except OSError as error:
        raise AdapterError(f"{shown_path(path)}: could not be written: {error.strerror or error}") from None


def is_gguf(path: FilePath) -> bool:
    """Whether `save_adapter` makes a GGUF file of this name."""
    return path.suffix.lower() == ".gguf"


def missing_base(adapter: Adapter, path: FilePath) -> str | None:
    """What an adapter would have to know of its base model to be saved under this name; None where it knows all."""
    if is_gguf(path) and adapter.architecture is None:
        return "its file does not say for which architecture it is"
    turned = any(place[-1] in ("q", "k") for place, _ in adapter.items())
    known = ARCHITECTURES.get(adapter.architecture)
    if not turned or adapter.row_order == ("ggml" if is_gguf(path) else "hf") or (known and known.rope_halves):
        return None
    if known is None:
        return f"its architecture {shown(str(adapter.architecture))} is not supported"
    return None if adapter.heads else "its file does not say how many heads there are, which order the rows of q and k"


def _check_savable(adapter: Adapter, as_gguf: bool) -> None:
    dora = [delta.magnitude is not None for _, delta in adapter.items()]
    if not dora:
        raise AdapterError(f"{adapter.source}: changes no weight; there is nothing to save")
    if adapter.stacked:
        raise AdapterError(f"{adapter.source}: is a stack of adapters; save them one by one")
    if as_gguf and any(dora):
        raise AdapterError(f"{adapter.source}: has DoRA magnitudes, which adapter GGUFs cannot hold: merge it instead")
    if any(dora) and not all(dora):
        raise AdapterError(f"{adapter.source}: has DoRA magnitudes for some weights only; PEFT wants all or none")
    for path, delta in adapter.items():
        if not abs(float(delta.scale)) <= 1e30:
            raise AdapterError(f"{adapter.source}: tensor {gguf_name(path)}: its scale is {delta.scale}, too large")


def _reordered(adapter: Adapter, order: str) -> Adapter:
    """The adapter with the rows of q and k in this order. What that takes is known (see `missing_base`)."""
    known = ARCHITECTURES.get(adapter.architecture)
    if adapter.row_order == order or known is None or known.rope_halves:
        return adapter.replace(row_order=order)
    turn = to_ggml_rows if order == "ggml" else to_hf_rows
    deltas = dict(adapter.items())
    for path, delta in deltas.items():
        if path[-1] in ("q", "k"):
            try:
                deltas[path] = turn(delta, adapter.heads[path[-1] == "k"])
            except AdapterError as error:
                raise AdapterError(f"{adapter.source}: tensor {gguf_name(path)}: {error}") from None
    return adapter.replace(deltas=build_deltas(deltas, len(adapter.deltas.layers)), row_order=order)


def _cast(source: str) -> Any:
    """What turns arrays into those of a file, and refuses numbers that its type cannot hold."""

    def cast(path: Path, what: str, values: jax.Array | np.ndarray, dtype: np.dtype) -> np.ndarray:
        with np.errstate(over="ignore"):
            made = np.ascontiguousarray(np.asarray(values).astype(dtype))
        if not np.isfinite(made.astype(np.float32)).all():
            raise AdapterError(
                f"{source}: tensor {gguf_name(path)}: its {what} has a value that is not finite in {dtype.name}"
            )
        return made

    return cast


@contextlib.contextmanager
def _new_directory(path: FilePath) -> Iterator[FilePath]:
    """A folder to write into, which becomes `path` at the end, in place of a PEFT directory that is there."""
    kept = _kept_files(path)
    folder = path.with_name(f".{secrets.token_hex(8)}.peft.part")
    try:
        folder.mkdir()
        yield folder
        for file in kept:
            shutil.copy2(file, folder / file.name)
        for file in folder.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if not path.exists() or not _exchange(folder, path):
            if path.exists():  # two renames: the old one has the other name for a moment
                old = path.with_name(f".{secrets.token_hex(8)}.peft.old")
                path.rename(old)
                folder.rename(path)
                folder = old
            else:
                folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _kept_files(path: FilePath) -> list[FilePath]:
    """The files beside an adapter that is to be replaced. AdapterError for a path that must not be replaced."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise AdapterError(f"{shown_path(path)}: is there and no folder; give another name, or one ending in .gguf")
    if not path.exists():
        if not path.absolute().parent.is_dir():
            raise AdapterError(f"{shown_path(path)}: the folder it shall be in does not exist: make it first")
        return []
    entries = sorted(path.iterdir())
    if entries and not (path / CONFIG).is_file():
        raise AdapterError(f"{shown_path(path)}: is a folder with other things in it; give the name of a new one")
    kept = [entry for entry in entries if entry.name not in (CONFIG, WEIGHTS)]
    for entry in kept:
        if not entry.is_file() or entry.is_symlink():
            raise AdapterError(f"{shown_path(path)}: holds {shown(entry.name)}, no plain file; give another name")
    return kept


def _exchange(new: FilePath, old: FilePath) -> bool:
    """Lets two folders change names at once, where the system can (Linux); False where it cannot."""
    with contextlib.suppress(AttributeError, OSError):
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        rename = ctypes.CDLL(None).renameat2
        return rename(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0
    return False
