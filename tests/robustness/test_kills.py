"""A short round of kills, and the harness itself: `make soak` does a long one."""

import os
import random
import sys

import pytest

from tests.robustness import kills
from tests.robustness.kills import KINDS, Runs, killed, soak_kills

# A run of two hundred steps that resumes; its only weight is 1 plus what `fault` adds.
RUN = """
import json, os, struct, sys, time
from pathlib import Path

run, fault, process = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
while process == "1" and not (run / "export/model.safetensors").exists():
    time.sleep(0.01)
if process == "1":
    sys.exit()
(run / "stages").mkdir(parents=True, exist_ok=True)
state = run / "state"
first = int(state.read_text()) if state.exists() else 0
if first and fault == "fails":
    sys.exit("cannot resume")
for step in range(first, 200):
    time.sleep(0.001)
    (run / "new").write_text(str(step + 1))
    os.replace(run / "new", state)
header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
(run / "export").mkdir(exist_ok=True)
weight = 1.0 + (first > 0) * (fault == "differs") * 2**-23
(run / "export/new").write_bytes(len(header).to_bytes(8, "little") + header + struct.pack("<f", weight))
os.replace(run / "export/new", run / "export/model.safetensors")
"""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("fault", "lost", "different"), [("none", False, False), ("fails", True, False), ("differs", False, True)]
)
def test_the_harness_sees_lost_runs_and_single_bits(tmp_path, monkeypatch, capsys, processes, fault, lost, different):
    def commands(run):
        return [[sys.executable, "-S", "-c", RUN, str(run), fault, str(number)] for number in range(processes)]

    monkeypatch.setattr(kills, "ALONE", 0.1)
    runs = Runs("quick", tmp_path, commands, {**os.environ})
    assert (killed([runs], 5, random.Random(0)) > 0) == (fault != "none")
    assert runs.kills >= 5 and (runs.lost > 0, runs.different > 0) == (lost, different)
    assert f"quick: {runs.kills} kills of {runs.runs} runs" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_killed_runs_end_with_the_same_arrays(tmp_path, kind):
    assert soak_kills(2, 0, tmp_path, [kind]) == 0
