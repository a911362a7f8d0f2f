"""The floors of the package: a module imports from its own floor or a lower one, never upward, never in a circle."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "realm_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))

# The first name below realm_jax decides the floor. Where two names share one, they do not import each other.
FLOORS = {
    "errors": -1,
    "compilation": -1,
    "gguf": 0,
    "quant": 1,
    "kernels": 2,
    "model": 3,
    "lora": 4,
    "decode": 5,
    "evaluate": 5,
    "logits": 5,
    "engine": 6,
    "speed": 6,
    "experiment": 6,
    "quantizer": 6,
    "finetune": 7,
    "cli": 8,
}
HANDS_OFF_JAX = ("gguf", "errors")
JAX_PACKAGES = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}


def module_name(path: Path) -> str:
    """Dotted name of a file of the package; an __init__.py has the name of its folder."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, known: set[str]) -> set[str]:
    """Dotted names of all modules that a file imports, those inside functions and type-checking blocks included."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))
            for alias in node.names:  # `from package import module` imports the module
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in known else base)
    return found


def import_graph() -> dict[str, set[str]]:
    """Module name -> names of the modules of the package that it imports."""
    known = {module_name(path) for path in MODULES}
    return {
        module_name(path): {name for name in imported_names(path, known) if name.partition(".")[0] == "realm_jax"}
        for path in MODULES
    }


def floor_key(name: str) -> str | None:
    """`realm_jax.gguf.reader` -> `gguf`; None for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def test_every_module_has_a_floor() -> None:
    homeless = {key for path in MODULES if (key := floor_key(module_name(path))) and key not in FLOORS}
    assert not homeless, f"give these a floor in {Path(__file__).name}: {sorted(homeless)}"


def test_no_upward_imports() -> None:
    wrong = []
    for name, imports in import_graph().items():
        key = floor_key(name)
        if key is None:
            continue  # the package itself hands names on from every floor
        for other in sorted(imports):
            target = floor_key(other)
            if target is None:
                wrong.append(f"{name} imports {other}: import from the module that defines the name")
            elif target != key and FLOORS[target] >= FLOORS[key]:
                wrong.append(f"{name} (floor {FLOORS[key]}) imports {other} (floor {FLOORS[target]})")
    assert not wrong, "\n".join(wrong)


def test_no_circular_imports() -> None:
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail("circular import: " + " -> ".join(error.args[1]))


def test_files_are_read_without_jax() -> None:
    known = {module_name(path) for path in MODULES}
    wrong = []
    for path in MODULES:
        if floor_key(module_name(path)) in HANDS_OFF_JAX:
            roots = {name.partition(".")[0] for name in imported_names(path, known)}
            wrong += [f"{module_name(path)} imports {root}" for root in sorted(roots & JAX_PACKAGES)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["realm_jax", "realm_jax.gguf", "realm_jax.cli"])
def test_importing_does_not_load_jax(module: str) -> None:
    code = f"import sys, {module}; sys.exit(', '.join(sorted({JAX_PACKAGES!r} & set(sys.modules))) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"import {module} loads: {done.stderr}"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.name == "__init__.py" and p.parent != PACKAGE], ids=module_name
)
def test_package_files_only_hand_names_on(path: Path) -> None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_all = isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
        assert is_docstring or is_all or isinstance(node, ast.Import | ast.ImportFrom), (
            f"{module_name(path)} line {node.lineno}: an __init__.py only hands names on"
        )
