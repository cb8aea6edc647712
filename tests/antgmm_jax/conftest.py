"""Devices that are not there, for the TPU's compiler."""

import pytest
from jax.experimental import topologies

from experiments.lab.planning.compilers import not_cached


@pytest.fixture
def v5e(monkeypatch):
    """Four TPUs that the compiler knows; a second run of the tests could not read their programs from the cache."""
    pytest.importorskip("libtpu")
    # Other processes may compile at the same time.
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    with not_cached():
        yield topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
