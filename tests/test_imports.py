"""What an import costs, and which way imports run."""

import ast
import pathlib
import subprocess
import sys

import pytest

import steelyard

ROOT = pathlib.Path(__file__).parents[1]
HEAVY = ("flax", "orbax", "grain", "tensorflow_datasets", "sklearn", "matplotlib", "tensorflow", "haiku", "equinox")
BORROWED = ("optim", "aggregate", "losses", "examples", "sparsity", "quant", "formats", "reparam", "tree")


def modules_after(statement):
    """Top-level modules of a fresh interpreter after one statement."""
    code = f"import sys; {statement}; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("module", [*(f"steelyard.{room}" for room in BORROWED), "steelyard_kernels"])
def test_borrowing_pulls_in_no_framework(module):
    assert not modules_after(f"import {module}") & set(HEAVY)


def test_all_borrowed_rooms_together_pull_in_no_framework():
    rooms = ", ".join(f"steelyard.{room}" for room in BORROWED)
    assert not modules_after(f"import {rooms}, steelyard_kernels.quant_matmul") & set(HEAVY)


def test_borrowing_waits_with_the_solvers_of_scipy():
    rooms = ", ".join(f"steelyard.{room}" for room in BORROWED)
    code = f"import sys, {rooms}; sys.exit('scipy.optimize' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_steelyard_is_lazy():
    assert "jax" not in modules_after("import steelyard")
    assert "jax" in modules_after("import steelyard; steelyard.optim.adamp")


def test_every_room_is_there_and_a_wrong_one_is_an_attribute_error():
    for room in steelyard.ROOMS:
        assert getattr(steelyard, room).__name__ == f"steelyard.{room}"
    with pytest.raises(AttributeError, match="its rooms are"):
        steelyard.optimm  # noqa: B018


def test_every_exported_name_is_there():
    for room in steelyard.ROOMS:
        module = getattr(steelyard, room)
        missing = [name for name in getattr(module, "__all__", []) if not hasattr(module, name)]
        assert not missing, f"{room}.__all__ names {missing}"


def imported(path):
    """Top-level packages that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize(
    ("folder", "above"),
    [
        ("kernels/steelyard_kernels", {"steelyard", "experiments", "launch", "configs"}),
        ("lib/steelyard", {"experiments", "launch", "configs"}),
    ],
)
def test_imports_run_downhill(folder, above):
    for path in (ROOT / folder).rglob("*.py"):
        assert not set(imported(path)) & above, f"{path.relative_to(ROOT)} imports from a floor above"
