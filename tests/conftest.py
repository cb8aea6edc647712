"""Environment of every test; set before jax or transformers is imported."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from tests import annotations

_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
# Tests compile many programs and run each a few times, so compile time is what they take: machine code without
# optimisation, by XLA's older emitters, takes a fifth of it (a tiny model's gradient: 12.6 s of CPU time, 2.3 s so).
# What XLA plans (fusion, memory, collectives) is the same. Processes that tests start inherit these.
_QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()
# Encoded data of this session alone: what another version of the code has written is not to be read.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="antgmm-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Test processes run side by side: threads of PyTorch that wait for one another burn many times what tiny products take.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Every annotation of a function, shapes and dtypes among them, is checked whenever a test calls it.
install_import_hook(("antgmm_jax", "pruning", "distill"), f"{annotations.__name__}.checked")


def pytest_configure():
    """Eight devices for the tests of sharding, in this process only: a command that is started sets its own number."""
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.devices()  # starts them, so that no command under test leaves another number to the tests behind it


@pytest.fixture(scope="module", autouse=True)
def _programs_are_let_go():
    """Programs of one file are freed after it: kept, those of all files take more memory maps than Linux grants."""
    yield
    import jax

    jax.clear_caches()
