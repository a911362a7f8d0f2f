"""Models split over several files, `<prefix>-00001-of-00003.gguf`. Called by `reader`.

The first file names the number of files; the others are found from its own folder and name, never from anything
written in a file. Keys: `split.no` (from 0), `split.count`, `split.tensors.count` (of all files together).
"""

from pathlib import Path

from realm_jax.gguf.header import Header
from realm_jax.gguf.types import Field, file_error, shown, shown_path

NUMBER_KEY = "split.no"
COUNT_KEY = "split.count"
TENSORS_KEY = "split.tensors.count"
SPLIT_KEYS = (NUMBER_KEY, COUNT_KEY, TENSORS_KEY)
MAX_FILES = 2**16 - 1


def split_paths(path: Path, fields: dict[str, Field]) -> list[Path]:
    """The files of the model whose first file is `path`, in order: `[path]` alone if it is not split.

    Raises GGUFError if `path` is not the first file, is not named as one, or if a sibling is missing or lies, through
    a symbolic link, in another folder than `path`. (Where `path` itself is a link, as in the Hugging Face
    cache, the siblings may link into the folder that it links into.)
    """
    count = _number(path, fields, COUNT_KEY, 0)
    if count <= 1:
        return [path]
    if count > MAX_FILES:
        raise file_error(path, f"key '{COUNT_KEY}' is {count:,}: a model has at most {MAX_FILES:,} files")
    number = _number(path, fields, NUMBER_KEY)
    if not 0 <= number < count:
        raise file_error(path, f"key '{NUMBER_KEY}' is {number:,}: of {count:,} files it must be 0 to {count - 1:,}")
    ending = _ending(number, count)
    if not path.name.endswith(ending):
        raise file_error(
            path,
            f"is file {number + 1} of {count} of a split model: its name must end in '{ending}', "
            "for the other files to be found",
        )
    prefix = path.name.removesuffix(ending)
    paths = [path.with_name(prefix + _ending(i, count)) for i in range(count)]
    if number:
        raise file_error(
            path, f"is file {number + 1} of {count} of a split model: open the first, {shown_path(paths[0])}"
        )
    for sibling in paths[1:]:
        _check_place(path, sibling)
    return paths


def check_shard(path: Path, header: Header, number: int, count: int) -> None:
    """Refuses the file at `path` if it does not say of itself that it is number `number` of `count` files."""
    found = _number(path, header.fields, NUMBER_KEY)
    if found != number:
        raise file_error(path, f"key '{NUMBER_KEY}' is {found:,}: file {number + 1} of {count} must say {number}")
    found = _number(path, header.fields, COUNT_KEY, count)
    if found != count:
        raise file_error(path, f"key '{COUNT_KEY}' is {found:,}, but {count} in the first file: the files do not match")


def check_tensor_count(path: Path, fields: dict[str, Field], found: int) -> None:
    """Refuses if all files together do not hold as many tensors as the first file at `path` says."""
    expected = _number(path, fields, TENSORS_KEY)
    if expected != found:
        raise file_error(
            path,
            f"key '{TENSORS_KEY}' is {expected:,}, but the files hold {found:,} tensors: they are not all of one model",
        )


def _ending(number: int, count: int) -> str:
    return f"-{number + 1:05d}-of-{count:05d}.gguf"


def _number(path: Path, fields: dict[str, Field], key: str, default: int | None = None) -> int:
    if key not in fields:
        if default is None:
            raise file_error(path, f"key '{key}' is missing: every file of a split model needs it")
        return default
    value = fields[key].value
    if not isinstance(value, int) or isinstance(value, bool):
        raise file_error(path, f"key '{key}' is {shown(repr(value))}: it must be an integer")
    return value


def _check_place(path: Path, sibling: Path) -> None:
    try:
        folder = sibling.resolve(strict=True).parent
        allowed = {path.parent.resolve(), path.resolve().parent}
    except FileNotFoundError:
        raise file_error(
            sibling, f"is missing: all files of the split model must stand beside {shown_path(path.name)}"
        ) from None
    except (OSError, RuntimeError) as error:
        raise file_error(sibling, f"cannot be followed: {error}") from None
    if folder not in allowed:
        raise file_error(
            sibling,
            f"is a link into another folder: the files of a split model must lie beside {shown_path(path.name)}",
        )
