"""What a newcomer relies on: the two commands, the pins, and that what the documents name is there."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from realm_jax.cli.main import realm

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()] + sorted(
    (ROOT / "docs").rglob("*.md")
)


def tracked_files() -> list[Path]:
    """Files under version control; a source archive without git has none to speak of."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def normal(name: str) -> str:
    """A package name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in requirements}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in pairs}


def make(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs make without the variables that an outer make hands down."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "EXTRA", "PYTHON"))
    }
    return subprocess.run(
        ["make", "--no-print-directory", *args], cwd=ROOT, env=clean | env, capture_output=True, text=True, check=False
    )


# --- set-up ----------------------------------------------------------------------------------------------------------


def test_constraints_are_plain_pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for line in lines:
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!+]*", line), line


def test_constraints_cover_every_dependency():
    extras = PROJECT["optional-dependencies"]
    wanted = required(PROJECT["dependencies"] + extras["dev"] + extras["notebooks"])
    assert wanted <= pins().keys(), sorted(wanted - pins().keys())


def test_no_package_index_is_named():
    for name in ("constraints.txt", "pyproject.toml", "Makefile", ".pre-commit-config.yaml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"index-url|find-links|pypi|https?://|file://", text), name


def test_the_package_imports_only_what_it_declares():
    # import name -> distribution, where they differ
    distributions = {"orbax": "orbax-checkpoint", "jaxlib": "jax"}
    declared = required(PROJECT["dependencies"])
    for path in sorted((ROOT / "realm_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for root in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"realm_jax"}:
                assert normal(distributions.get(root, root)) in declared, f"{path.name} imports {root}"


def test_ci_runs_the_newcomers_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "exec make test"


@pytest.mark.parametrize("target", ["demo", "test", "test-all", "lint", "format", "clean"])
def test_make_lists_and_knows_its_targets(target):
    assert f"make {target} " in make("help").stdout
    done = make("--dry-run", target, EXTRA="cpu")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("printed", "extra"),
    [
        ("| NVIDIA-SMI 535.1   Driver Version: 535.1   CUDA Version: 12.2 |", "cuda12"),
        ("| NVIDIA-SMI 580.65  Driver Version: 580.65  CUDA Version: 13.0 |", "cuda13"),
        ("| NVIDIA-SMI 595.1   KMD Version: 595.1   CUDA UMD Version: 14.1 |", "cuda13"),
        ("| NVIDIA-SMI 450.1   Driver Version: 450.1   CUDA Version: 11.0 |", "cpu"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "cpu"),
    ],
)
def test_the_driver_picks_the_extra(tmp_path, printed, extra):
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\ncat <<'END'\n{printed}\nEND\n")
    command.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert f"EXTRA={extra} " in make("help", PATH=path).stdout
    assert "EXTRA=cpu " in make("help", "EXTRA=cpu", PATH=path).stdout


def test_an_unknown_extra_and_a_useless_python_are_one_line(tmp_path):
    assert "use cpu, cuda12 or cuda13" in make("help", "EXTRA=tpu").stderr
    done = make("-f", str(ROOT / "Makefile"), f"VENV={tmp_path / 'venv'}", "demo", "EXTRA=cpu", "PYTHON=/bin/false")
    assert done.returncode != 0
    assert "error: PYTHON=/bin/false does not run, or is older than 3.11" in done.stderr
    assert not (tmp_path / "venv").exists()


# --- documents -------------------------------------------------------------------------------------------------------


def code_blocks(path: Path) -> str:
    """What stands in fenced or indented blocks and in backticks, and so may be typed."""
    text = path.read_text(encoding="utf-8")
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^(?: {4}|\t)(.*)$", text, re.MULTILINE)
    return "\n".join([*fenced, *indented, *re.findall(r"`([^`\n]+)`", text)])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_in_documents_exist(path):
    code = code_blocks(path)
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for target in re.findall(r"(?m)^\s*(?:\$ )?make ([a-z-]+)", code):
        assert target in targets, f"{path.name}: make {target}"
    context = click.Context(realm)
    for line in re.findall(r"(?m)^\s*(?:\$ )?(?:\.venv/bin/)?realm ([a-z].*)$", code):
        words = line.split()
        command = realm.get_command(context, words[0])
        assert command is not None, f"{path.name}: realm {line}"
        options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        used = {word.partition("=")[0].strip("[]") for word in words if re.match(r"\[?--[a-z]", word)}
        assert used <= options, f"{path.name}: realm {line}: {sorted(used - options)}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


# --- files -----------------------------------------------------------------------------------------------------------


def test_no_large_or_stray_files():
    for path in tracked_files():
        assert path.stat().st_size < 8_000_000, f"{path.relative_to(ROOT)} is too large"
        assert not re.search(r"\.(orig|rej|bak|swp|pyc)$|~$|\.DS_Store$", path.name), path


def test_no_private_paths_or_secrets():
    private = re.compile(rb"/(?:home|Users)/[a-z]\w+/|-----BEGIN [A-Z ]*PRIVATE KEY|\bhf_[A-Za-z0-9]{30,}")
    for path in tracked_files():
        if path != Path(__file__).resolve() and path.suffix not in {".gguf", ".npy", ".npz", ".png"}:
            found = private.search(path.read_bytes())
            assert not found, f"{path.relative_to(ROOT)}: {found[0]!r}"


def test_the_list_of_slow_tests_names_tests_that_are_there():
    lines = (ROOT / "tests" / "slow_tests.txt").read_text(encoding="utf-8").splitlines()
    for line in (line for line in lines if not line.startswith("#")):
        file, _, name = line.partition("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in text, line
