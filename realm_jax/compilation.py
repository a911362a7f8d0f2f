"""Compiled programs kept on disk between processes, and a clock of the time that compiling takes.

`enable_compilation_cache` is called by `model.load` and the command line; `compile_seconds` by `decode.generate` and
the experiments, to tell compiling from running.
"""

import hashlib
import os
import platform
import tempfile
from pathlib import Path

import jax

OFF = ("off", "0", "false", "no")
MIN_COMPILE_SECONDS = 0.1
"""Programs that compile faster than this are not worth a file."""

_COMPILED = "/jax/core/compile/backend_compile_duration"
_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _COMPILED,
)
_clock = {"seconds": 0.0, "programs": 0}


def enable_compilation_cache() -> Path | None:
    """Let XLA keep compiled programs on disk, so that a second process starts in seconds; returns the folder.

    The folder is `$REALM_JAX_CACHE`, else `realm_jax/xla` in `$XDG_CACHE_HOME` or `~/.cache`, in a subfolder for this
    machine's processor (CPU programs do not run on another). A cache that the user has set up in JAX itself
    (`JAX_COMPILATION_CACHE_DIR`) wins. Returns None, and changes nothing, with `REALM_JAX_CACHE=off`, or where the
    folder cannot be written. Calling it again is harmless.
    """
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    folder = _cache_folder()
    if folder is None or not _is_writable(folder):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return folder


def compile_seconds() -> float:
    """Seconds this process has spent tracing, compiling or fetching programs; take the difference of two calls."""
    return _clock["seconds"]


def compiled_programs() -> int:
    """How many programs this process has compiled or fetched so far."""
    return _clock["programs"]


def _cache_folder() -> Path | None:
    chosen = os.environ.get("REALM_JAX_CACHE", "")
    if chosen.lower() in OFF:
        return None
    if chosen:
        return Path(chosen).expanduser() / _processor()
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home folder
        return None
    return base / "realm_jax" / "xla" / _processor()


def _processor() -> str:
    """A name for this machine's instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine() or 'unknown'}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _is_writable(folder: Path) -> bool:
    """Create the folder, for this user alone (whoever writes there has their programs run), and try it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _on_event(event: str, seconds: float, **_: str | int) -> None:
    if event in _COMPILE_EVENTS:
        _clock["seconds"] += seconds
        _clock["programs"] += event == _COMPILED


jax.monitoring.register_event_duration_secs_listener(_on_event)
