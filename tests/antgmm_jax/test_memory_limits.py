"""Limits of memory by control groups of Linux."""

import math

import numpy as np
import pytest

from antgmm_jax.parallel import memory
from antgmm_jax.parallel.memory import memory_limit

SECOND, FIRST = "0::/jobs/one/step\n", "12:cpu,cpuacct:/jobs/one\n9:memory:/jobs/one\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "max"}, math.inf),
        ("0::/\n", {"memory.max": "4096"}, 4096),
        (SECOND, {"jobs/one/step/memory.max": "max", "jobs/one/memory.max": "900", "jobs/memory.max": "1000"}, 900),
        (FIRST, {"memory/jobs/one/memory.limit_in_bytes": "700", "cpu/jobs/one/memory.max": "1"}, 700),
        # In a container, the group of the process is mounted as the root.
        (FIRST, {"memory/memory.limit_in_bytes": "800"}, 800),
        ("", {}, math.inf),
    ],
)
def test_the_smallest_limit_of_the_groups_of_a_process_counts(tmp_path, own, files, expected):
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text(own)
    assert memory_limit(tmp_path / "groups", tmp_path / "own") == expected


def test_other_systems_have_no_limit(tmp_path):
    assert memory_limit(tmp_path / "groups", tmp_path / "own") == math.inf


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([[7, 40_000, 0]], 40_000),  # a GPU of another machine has less
        ([[7, 90_000, 0]], 80_000),
        ([[0, 80_000, 1]], 40_000),  # a CPU process on this machine: both share its memory
    ],
)
def test_all_processes_count_with_the_least_memory(monkeypatch, others, expected):
    """Else they would choose batches of different sizes, and wait for each other for ever."""
    on_cpu = bool(others[0][2])

    def gathered(mine):
        assert mine[1] == 80_000 and bool(mine[2]) is on_cpu
        return np.array([mine, *([mine[0] if on_cpu else name, *rest] for name, *rest in others)], np.uint32)

    monkeypatch.setattr(memory.jax, "process_count", lambda: 2)
    monkeypatch.setattr(memory.multihost_utils, "process_allgather", gathered)
    monkeypatch.setattr(memory, "_own", lambda: 0 if on_cpu else 80_000 << 20)
    monkeypatch.setattr(memory, "_of_host", lambda: 80_000 << 20)
    with memory.agreed():
        assert memory.device_memory() == expected << 20
    assert memory.device_memory() == 80_000 << 20
