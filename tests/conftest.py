"""Environment of every test; set before jax or transformers is imported."""

import atexit
import gc
import importlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from tests import annotations, flags

_MAPS = Path("/proc/self/maps")  # Linux only
_looked = [0.0]
"""Time of the last look at it, which takes 20 ms where there are many."""
_FIRST = ("test_pipeline.py", "test_cluster.py", "test_kills.py", "test_docs.py")
_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
# Processes that tests start inherit these flags.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags.QUICK}".strip()
# A cache of encoded data for this session only: tests must not read what another version of the code has written.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="antgmm-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Test processes run side by side: waiting threads of PyTorch would use far more CPU time than the tiny products do.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A library that is first imported by a hooked module is compiled from its source in every process: the hook looks for
# compiled files of its own. Imported before, these take 6 s of CPU time instead of 27.
for _library in ("flax.nnx", "optax", "orbax.checkpoint", "torch._dynamo", "torchvision", "transformers"):
    importlib.import_module(_library)
# Python's collector passes over the objects of all libraries again and again: 15 % of the CPU time of the tests.
gc.freeze()
atexit.register(gc.unfreeze)  # else the objects are reported as leaks
gc.set_threshold(20_000)
# Annotations, shapes and dtypes included, are checked at every call in a test.
annotations.check()


def pytest_configure():
    """Gives this process eight devices for the sharding tests; commands that tests start set their own number."""
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.devices()  # starts the backend now, so that no command under test can change the number of devices


def pytest_collection_modifyitems(items):
    """Puts tests that take minutes first; at the end one process would wait for the other."""
    items.sort(key=lambda item: item.path.name not in _FIRST)


@pytest.fixture(autouse=True)
def _clear_programs():
    """Frees the compiled programs of tests before they need more memory maps than Linux allows a process (65 530)."""
    yield
    if time.monotonic() < _looked[0] + 5:
        return
    _looked[0] = time.monotonic()
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()
