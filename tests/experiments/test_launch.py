"""Processes that a command starts beside itself: each with its own number and cores, none left behind."""

import json
import os
import sys

import pytest

from antgmm_jax.errors import AntgmmError
from experiments import launch

SCRIPT = """
import json, os, sys
folder, address, number = sys.argv[1], sys.argv[3], sys.argv[5]
told = {"argv": sys.argv, "cores": sorted(os.sched_getaffinity(0))}
open(f"{folder}/{number}.json", "w").write(json.dumps(told))
sys.exit(int(number) if "fail" in os.environ else 0)
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are handed out on Linux alone")


@pytest.fixture
def cores(monkeypatch, tmp_path):
    """The cores of this process, its command replaced by one that writes down how it was started."""
    mine = sorted(os.sched_getaffinity(0))
    monkeypatch.setattr(launch, "COMMAND", (sys.executable, "-c", SCRIPT))
    monkeypatch.setattr(sys, "argv", ["antgmm", str(tmp_path)])
    yield mine
    os.sched_setaffinity(0, mine)


def test_each_process_gets_its_number_and_its_cores(cores, tmp_path):
    with launch.others_started(len(cores)) as address:
        assert os.sched_getaffinity(0) == {cores[0]}
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(found) == sorted(str(number) for number in range(1, len(cores)))
    for number, told in found.items():
        assert told["argv"][2:] == ["--coordinator", address, "--process", number]
        assert told["cores"] == [cores[int(number)]]


def test_more_processes_than_cores_are_refused(cores):
    with pytest.raises(AntgmmError, match=f"there are {len(cores)} cores"), launch.others_started(len(cores) + 1):
        pass


def test_a_process_that_fails_ends_the_run(cores, monkeypatch, capsys):
    if len(cores) < 2:
        pytest.skip("one core takes one process")
    ended = []
    monkeypatch.setenv("fail", "yes")
    monkeypatch.setattr(launch, "GRACE", 0.1)
    monkeypatch.setattr(launch.os, "_exit", ended.append)
    with launch.others_started(2):
        for _ in range(600):
            if ended:
                break
            launch.threading.Event().wait(0.1)
    assert ended == [2]
    assert "another process of the run has failed (it said nothing)" in capsys.readouterr().err
