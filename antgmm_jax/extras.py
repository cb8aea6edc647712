"""Optional dependencies: the extras of pyproject.toml, the error for one that is not installed, and versions."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from antgmm_jax.errors import AntgmmError

EXTRAS = {
    "energy": ("energy figures", ("codecarbon",)),
    "eval": ("scores of answers", ("rouge_score",)),
    "parquet": ("Parquet files", ("pyarrow",)),
    "quantize": ("quantized exports", ("compressed_tensors",)),
    "report": ("reports", ("matplotlib",)),
    "serve": ("servers", ("litserve", "prometheus_client")),
    "stablehlo": ("packages for JAX", ("flatbuffers",)),
    "tasks": ("digits, charts, photographs and tables", ("skimage", "sklearn")),
    "tensorboard": ("metrics for TensorBoard", ("tensorboardX",)),
    "tfds": ("TFDS folders", ("importlib_resources", "tensorflow_datasets")),
    "torch": ("PyTorch checks", ("torch",)),
}
"""Extra -> what it is for, and the packages that are imported for it."""


def require(*extras: str) -> None:
    """Checks that the packages of optional extras are installed, without importing them.

    Args:
        extras: keys of `EXTRAS`.

    Raises:
        AntgmmError: names the packages that are missing, what needs them, and the command that adds them.
    """
    absent = {extra: [name for name in EXTRAS[extra][1] if find_spec(name) is None] for extra in extras}
    missing = {extra: names for extra, names in absent.items() if names}
    if missing:
        purposes = _listed([EXTRAS[extra][0] for extra in missing])
        packages = _listed([name for names in missing.values() for name in names])
        raise AntgmmError(f"{purposes} need {packages}: {install(*missing)}")


def install(*extras: str) -> str:
    """Returns the command that adds extras of pyproject.toml to the environment of `make install`."""
    return f".venv/bin/pip install -e '.[{','.join(extras)}]' -c constraints.txt"


def versions_of(*names: str) -> dict[str, str]:
    """Returns the versions of those of the named packages that are installed."""
    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
