"""Limits of memory by control groups of Linux."""

import math

import pytest

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
