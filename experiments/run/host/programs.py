"""Compiled programs that JAX keeps in a folder (`jax_compilation_cache_dir`), with several processes."""

import uuid
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

from antgmm_jax.parallel.processes import run_on_first, text_from_first
from experiments.run.host.console import say


def share_programs() -> None:
    """Lets no process keep programs in a folder that another one does not see.

    Only the first process writes programs. When GPUs are used, XLA divides the measurements of a compilation over all
    processes: those that compile would wait up to 24 hours for one that has read the program. All must call it.
    """
    settings = jax.config.values
    folder = (settings["jax_enable_compilation_cache"] and settings["jax_compilation_cache_dir"]) or ""
    jax.config.update("jax_enable_compilation_cache", False)  # of the programs that compare the folders, too
    token = text_from_first(lambda: _written(folder))
    sees = token == folder if "://" in token else bool(token and folder) and (Path(folder) / token).is_file()
    shared = bool(multihost_utils.process_allgather(np.array(sees)).all())
    if shared:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()  # JAX looks at the setting once
    elif token:
        say(f"note: not all processes see {folder}: programs are compiled at each start; XDG_CACHE_HOME sets it")
    if token and "://" not in token:
        run_on_first(lambda: (Path(folder) / token).unlink(missing_ok=True))


def _written(folder: str) -> str:
    """Name of a new file in a folder; "" without a folder or where it cannot be written, a URL itself."""
    if not folder or "://" in folder:
        return folder
    name = f".seen-{uuid.uuid4().hex}"
    with suppress(OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).touch()
        return name
    return ""
