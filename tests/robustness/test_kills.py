"""A short round of kills, and the harness itself: `make soak` does a long one."""

import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.robustness import kills
from tests.robustness.kills import KINDS, Call, Runs, killed, soak_kills


def _quick_run(run: Path, fault: str, process: str) -> None:
    """A run of two hundred steps that resumes; its only weight is 1 plus what `fault` adds."""
    export, state = run / "export", run / "state"
    while process == "1" and not (export / "model.safetensors").exists():
        time.sleep(0.01)
    if process == "1":
        return
    (run / "stages").mkdir(parents=True, exist_ok=True)
    first = int(state.read_text()) if state.exists() else 0
    if first and fault == "fails":
        sys.exit("cannot resume")
    for step in range(first, 200):
        time.sleep(0.001)
        (run / "new").write_text(f"{step + 1}")
        (run / "new").replace(state)
    weight = 1.0 + (first > 0) * (fault == "differs") * 2**-23
    export.mkdir(exist_ok=True)
    save_file({"w": np.array([weight], np.float32)}, export / "new")
    (export / "new").replace(export / "model.safetensors")


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("fault", "lost", "different"), [("none", False, False), ("fails", True, False), ("differs", False, True)]
)
def test_the_harness_sees_lost_runs_and_single_bits(tmp_path, monkeypatch, capsys, processes, fault, lost, different):
    def calls(run):
        return [Call(_quick_run, [run, fault, f"{number}"]) for number in range(processes)]

    monkeypatch.setattr(kills, "ALONE", 0.1)
    runs = Runs("quick", tmp_path, calls)
    assert (killed([runs], 5, random.Random(0)) > 0) == (fault != "none")
    assert runs.kills >= 5 and (runs.lost > 0, runs.different > 0) == (lost, different)
    assert f"quick: {runs.kills} kills of {runs.runs} runs" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_killed_runs_end_with_the_same_arrays(tmp_path, kind):
    assert soak_kills(2, 0, tmp_path, [kind]) == 0
