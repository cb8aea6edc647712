"""The direction of the arrows: `antgmm_jax` <- `pruning`, `distill`, `data` <- `experiments`, and nothing else."""

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "experiments/lab/peers/requirements.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ALLOWED = {
    "antgmm_jax": {"antgmm_jax"},
    "pruning": {"pruning", "antgmm_jax"},
    "distill": {"distill", "antgmm_jax"},
    "data": {"data", "antgmm_jax"},
    "experiments": {"experiments", "antgmm_jax", "pruning", "distill", "data"},
}
# Distributions whose package has another name.
PACKAGE_OF = {
    "fonttools": "fontTools",
    "pillow": "PIL",
    "orbax-checkpoint": "orbax",
    "tensorflow-datasets": "tensorflow_datasets",
    "google-tunix": "tunix",
}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level package and line of every import of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield path.relative_to(ROOT).parts[0], node.lineno


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no file of {package} found"
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_along_the_arrows(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(package)
        for name, line in imports(path)
        if name in {*ALLOWED, "tests"} - ALLOWED[package]
    ]
    assert not wrong


@pytest.mark.parametrize("package", ALLOWED)
def test_every_public_name_of_a_package_is_there(package):
    module = importlib.import_module(package)
    assert all(hasattr(module, name) for name in getattr(module, "__all__", ()))


def test_only_checkpoint_touches_orbax():
    users = [path.name for package in ALLOWED for path in files(package) if "orbax" in dict(imports(path))]
    assert users == ["checkpoint.py"]


def test_every_third_party_import_is_declared():
    def packages(requirements):
        names = [re.split(r"[^\w-]", requirement)[0] for requirement in requirements]
        return {PACKAGE_OF.get(name, name) for name in names}

    extras = PROJECT["project"]["optional-dependencies"]
    declared = packages(PROJECT["project"]["dependencies"]) | packages(extras["torch"] + extras["assets"])
    known = declared | set(sys.stdlib_module_names) | set(ALLOWED)
    # The peers' contenders run in an environment of their own, with a list of their own.
    theirs = packages(line for line in PEERS.read_text().splitlines() if not line.startswith("#"))
    missing = {
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for package in ALLOWED
        for path in files(package)
        for name, line in imports(path)
        if name not in known and not (PEERS.parent in path.parents and name in theirs)
    }
    assert not missing


def test_the_wheel_holds_every_package():
    assert set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == set(ALLOWED)
