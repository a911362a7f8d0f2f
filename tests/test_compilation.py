"""The persistent compilation cache: where it is, who may say otherwise, and that a second process profits."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from realm_jax import compilation

NAMES = ("JAX_COMPILATION_CACHE_DIR", "REALM_JAX_CACHE", "XDG_CACHE_HOME", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def python(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in NAMES} | {"JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.strip()


SHOW = "from realm_jax.compilation import enable_compilation_cache as e; import jax; " \
    "print(e(), e(), jax.config.jax_compilation_cache_dir, sep='|')"  # fmt: skip


def folders(**environment: str) -> list[str]:
    return python(SHOW, **environment).split("|")


def test_the_folder_is_in_the_users_cache_and_private(tmp_path):
    first, second, in_jax = folders(XDG_CACHE_HOME=str(tmp_path))
    assert first == second == in_jax
    folder = Path(first)
    assert folder.parent == tmp_path / "realm_jax" / "xla"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (home,) = set(folders(HOME=str(tmp_path)))
    assert Path(home).parent == tmp_path / ".cache" / "realm_jax" / "xla"


def test_the_environment_may_choose_another_folder_or_none(tmp_path):
    assert Path(folders(REALM_JAX_CACHE=str(tmp_path / "mine"))[0]).parent == tmp_path / "mine"
    assert folders(REALM_JAX_CACHE="off") == ["None"] * 3
    assert folders(REALM_JAX_CACHE="OFF", XDG_CACHE_HOME=str(tmp_path)) == ["None"] * 3
    assert not list(tmp_path.glob("realm_jax"))


def test_a_cache_set_up_in_jax_wins(tmp_path):
    assert folders(JAX_COMPILATION_CACHE_DIR=str(tmp_path), REALM_JAX_CACHE="/nowhere") == [str(tmp_path)] * 3


def test_a_folder_that_cannot_be_written_is_left_alone_in_silence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert folders(REALM_JAX_CACHE=str(tmp_path / "file")) == ["None"] * 3


def test_a_second_process_does_not_compile(tmp_path):
    code = (
        "from realm_jax.compilation import *; enable_compilation_cache(); import jax, jax.numpy as jnp\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "events = []\n"
        "jax.monitoring.register_event_listener(lambda event, **_: events.append(event))\n"
        "jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((8, 8))).block_until_ready()\n"
        "print(events.count('/jax/compilation_cache/cache_hits'), events.count('/jax/compilation_cache/cache_misses'))"
    )
    first = python(code, REALM_JAX_CACHE=str(tmp_path)).split()
    second = python(code, REALM_JAX_CACHE=str(tmp_path)).split()
    assert int(first[1]) > 0 and second == [str(int(first[0]) + int(first[1])), "0"]


def test_the_clock_counts_compiling_and_nothing_else():
    double = jax.jit(lambda x: x * 2 + 1)
    x = jnp.arange(3.0)
    before = compilation.compile_seconds(), compilation.compiled_programs()
    double(x).block_until_ready()
    after = compilation.compile_seconds(), compilation.compiled_programs()
    assert after[0] > before[0] and after[1] == before[1] + 1
    double(x + 1 - 1).block_until_ready()
    once_more = compilation.compiled_programs()
    double(x).block_until_ready()
    assert compilation.compiled_programs() == once_more


@pytest.mark.parametrize("error", [OSError, FileNotFoundError])
def test_a_machine_without_cpuinfo_has_a_name_too(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Path, "read_text", fail)
    assert compilation._processor()
