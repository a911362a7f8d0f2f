"""GGUF files, opened by memory map: metadata at once, tensor bytes when asked for. The model loader calls this.

Nothing of the tensor data is read until `GGUFFile.raw` is looked into. A file that another program cuts short while
it is mapped ends this process with SIGBUS at the next look, as with any memory map: replace files, do not truncate.
"""

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from realm_jax.gguf.header import MAX_TENSORS, Header, read_header
from realm_jax.gguf.split import SPLIT_KEYS, check_shard, check_tensor_count, split_paths
from realm_jax.gguf.types import TYPE_BY_NAME, Field, TensorInfo, file_error, shown, shown_path


@dataclass(frozen=True)
class _Shard:
    path: Path
    map: mmap.mmap
    header: Header


class GGUFFile:
    """An open GGUF model, of one file or several. A context manager; see `open_gguf`.

    path: the file as given. paths: all files of a split model, `(path,)` otherwise.
    version, alignment: of the first file.
    fields: metadata key -> `Field`, in file order; without the `split.*` keys where several files are joined.
    tensors: name -> `TensorInfo`, in file order, first file first.
    """

    def __init__(self, shards: list[_Shard]):
        first = shards[0]
        self.path = first.path
        self.paths = tuple(shard.path for shard in shards)
        self.version = first.header.version
        self.alignment = first.header.alignment
        dropped = SPLIT_KEYS if len(shards) > 1 else ()
        self.fields: dict[str, Field] = {k: f for k, f in first.header.fields.items() if k not in dropped}
        self.tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            self.tensors |= shard.header.tensors
        self._maps = [shard.map for shard in shards]

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata key -> plain value: int, float, bool, str, list or read-only 1-D array."""
        return {key: field.plain for key, field in self.fields.items()}

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor: a read-only uint8 view of the map, shape (*shape[:-1], bytes of a row).

        The view stays valid after `close`, which then leaves the map to it. Raises GGUFError for a name that the
        file does not have and for a closed file.
        """
        info, buffer = self._find(name)
        row_bytes = TYPE_BY_NAME[info.format].row_bytes(info.shape[-1])
        flat = np.frombuffer(buffer, np.uint8, info.nbytes, info.offset)
        return flat.reshape(*info.shape[:-1], row_bytes)

    def release(self, name: str) -> None:
        """Lets the memory pages that lie wholly within a tensor go; looking again reads them from the file again.

        Best effort: does nothing where the system cannot. Raises GGUFError as `raw` does.
        """
        info, buffer = self._find(name)
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (info.offset + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            buffer.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Closes the maps; those that arrays still look into close when the last of these arrays goes."""
        maps, self._maps = self._maps, []
        _close(maps)

    def _find(self, name: str) -> tuple[TensorInfo, mmap.mmap]:
        if name not in self.tensors:
            raise file_error(self.path, f"has no tensor {shown(str(name))}; it has {len(self.tensors):,} others")
        if not self._maps:
            raise file_error(self.path, f"is closed, so tensor {shown(name)} cannot be read: open it again")
        info = self.tensors[name]
        return info, self._maps[info.shard]

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        content = f"version {self.version}, {len(self.fields)} keys, {len(self.tensors)} tensors"
        return f"GGUFFile({str(self.path)!r}, {content})"


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Opens a GGUF file, or all files of a split model by its first, and reads its metadata and tensor list.

    Versions 2 and 3, little-endian. Raises GGUFError, one line, for a file that cannot be read, is broken, or
    contradicts itself, before memory is taken for what it claims.
    """
    path = Path(path)
    shards: list[_Shard] = []
    owners: dict[str, Path] = {}
    try:
        shards.append(_open_shard(path, 0))
        fields = shards[0].header.fields
        paths = split_paths(path, fields)
        _claim_names(owners, shards[0])
        for number, sibling in enumerate(paths[1:], 1):
            shards.append(_open_shard(sibling, number))
            check_shard(sibling, shards[-1].header, number, len(paths))
            shards[-1].header.fields.clear()  # the first file speaks for all; the rest need not stay in memory
            _claim_names(owners, shards[-1])
        if len(paths) > 1:
            check_tensor_count(path, fields, len(owners))
        return GGUFFile(shards)
    except BaseException:
        _close([shard.map for shard in shards])
        raise


def _open_shard(path: Path, number: int) -> _Shard:
    buffer = _map(path)
    try:
        return _Shard(path, buffer, read_header(buffer, shown_path(path), number))
    except BaseException:
        _close([buffer])
        raise


def _map(path: Path) -> mmap.mmap:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise file_error(path, "is a folder: give the GGUF file in it")
        if not stat.S_ISREG(status.st_mode):
            raise file_error(path, "is not a regular file: a GGUF file must be one, to be mapped into memory")
        if not status.st_size:
            raise file_error(path, "is empty: a GGUF file starts with the bytes 'GGUF'")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise file_error(path, "no such file: give the path of a GGUF file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise file_error(path, f"cannot be read: {reason}") from None


def _claim_names(owners: dict[str, Path], shard: _Shard) -> None:
    """Enters the tensors of a shard into `owners`, name -> file; refuses a name that another file has."""
    if both := owners.keys() & shard.header.tensors.keys():
        name = min(both)
        raise file_error(
            shard.path,
            f"tensor {shown(name)} stands in {shown_path(owners[name].name)} too: each tensor must stand in one file",
        )
    owners |= dict.fromkeys(shard.header.tensors, shard.path)
    if len(owners) > MAX_TENSORS:
        raise file_error(shard.path, f"the files up to here hold over {MAX_TENSORS:,} tensors, the most allowed")


def _close(maps: list[mmap.mmap]) -> None:
    for buffer in maps:
        try:
            buffer.close()
        except BufferError:  # an array still looks into it
            continue
