"""Vision-language models in JAX: load, run, resize and save them.

Public names are imported on first use, so that `antgmm --help` does not wait for JAX and transformers.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "AntgmmError": "errors",
    "Functional": "pure",
    "LMMConfig": "config",
    "functional": "pure",
    "generate": "decoding",
    "load_hf": "io.convert",
    "open_hf": "io.convert",
    "preset": "presets",
    "resize": "axes",
    "save_hf": "io.convert",
    "sizes": "axes",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'antgmm_jax' has no attribute {name!r}")
    return getattr(import_module(f"antgmm_jax.{_HOME[name]}"), name)
