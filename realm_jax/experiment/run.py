"""Run directories: one folder a run, with the resolved config, the environment and metrics.

Called by the scripts in `experiments/` and by the command line.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from realm_jax.errors import RealmError
from realm_jax.experiment.config import dump_toml, flatten, read_toml

_LISTED_PACKAGES = ("realm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "gguf")


class Run:
    """One run's folder: `config.toml` (resolved), `environment.json`, `metrics.jsonl`, and what the run adds.

    Made by `Run.create`, reopened by `Run.resume`. `folder` is its path.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._metrics = folder / "metrics.jsonl"

    @classmethod
    def create(cls, config: Any, stem: str, *, root: str | Path = "runs", name: str | None = None) -> Run:
        """A new folder `root/name`, or `root/stem-<date>-<time>`. Raises RealmError if `root/name` is there."""
        folder = _new_folder(Path(root), stem, name)
        (folder / "config.toml").write_text(dump_toml(config), encoding="utf-8")
        run = cls(folder)
        run.save_json("environment.json", describe_environment())
        return run

    @classmethod
    def resume(cls, config: Any, stem: str, *, root: str | Path = "runs", name: str | None = None) -> Run:
        """The folder `root/name`, or the newest `root/stem-*`.

        Raises RealmError: no such run, or one made with another config (named key by key).
        """
        folders = [Path(root, name)] if name else sorted(Path(root).glob(f"{stem}-[0-9]*"))
        folders = [folder for folder in folders if (folder / "config.toml").is_file()]
        if not folders:
            raise RealmError(f"{Path(root, name or stem + '-*')}: no run to resume; start one without --resume")
        folder = folders[-1]
        saved = flatten(read_toml(folder / "config.toml"))
        wanted = flatten(tomllib.loads(dump_toml(config)))
        changed = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
        if changed:
            key = changed[0]
            raise RealmError(
                f"{folder}: made with another config: {key!r} was {saved.get(key)!r}, now {wanted.get(key)!r}"
                f" ({len(changed)} changed in all); resume with the same config or start a new run"
            )
        return cls(folder)

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl, on disk when this returns; arrays of one element become numbers."""
        line = json.dumps({key: _plain(value) for key, value in values.items()}, ensure_ascii=False)
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl; a last line cut short by a kill is left out."""
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text(encoding="utf-8", errors="replace").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def keep_metrics(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the lines for which `wanted(line)` is false: a resumed run writes them again."""
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in self.metrics() if wanted(line)]
        _replace_text(self._metrics, "".join(lines))

    def save_json(self, name: str, value: Any) -> Path:
        """Write `value` as `folder/name`, whole or not at all."""
        return self.save_text(name, json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n")

    def save_text(self, name: str, text: str) -> Path:
        """Write `text` as `folder/name`, whole or not at all."""
        return _replace_text(self.folder / name, text)


def read_json(path: str | Path) -> Any:
    """What `Run.save_json` wrote. Raises RealmError where the file is not there or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RealmError(f"{path}: cannot read: {error.strerror}") from error
    except ValueError as error:
        raise RealmError(f"{path}: not JSON: {error}") from error


def describe_environment() -> dict[str, Any]:
    """Versions of Python and the packages that matter, the devices, and the command line."""
    import jax

    versions = {}
    for package in _LISTED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _new_folder(root: Path, stem: str, name: str | None) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    names = [name] if name else [f"{stem}-{stamp}", *(f"{stem}-{stamp}-{i}" for i in range(1, 100))]
    for candidate in names:
        folder = root / candidate
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise RealmError(f"{folder}: cannot make the run directory: {error.strerror}") from error
    raise RealmError(f"{root / names[0]}: this run exists already; use --resume or another --name")


def _plain(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value) if isinstance(value, Path) else value


def _replace_text(path: Path, text: str) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
