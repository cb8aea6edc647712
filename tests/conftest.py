"""Environment of every test; set before jax or transformers is imported."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
# Eight devices for the tests of sharding; measured to cost the others nothing.
_DEVICES = "--xla_force_host_platform_device_count=8"

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
# Encoded data of this session alone: what another version of the code has written is not to be read.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="antgmm-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module", autouse=True)
def _programs_are_let_go():
    """Programs of one file are freed after it: kept, those of all files take more memory maps than Linux grants."""
    yield
    import jax

    jax.clear_caches()
