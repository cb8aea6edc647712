"""A long round: `python -m tests.robustness.soak [--inputs N] [--kills N] [--seed S]`, or `make soak`.

Inputs are damaged as in `fuzzing`. Whole runs are killed with SIGKILL at random moments until one ends; the arrays of
their stages and exports must be those of a run that nobody killed, to the bit.
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from antgmm_jax.io import checkpoint
from tests.experiments.tiny import save_teacher, write_recipe

ROOT = Path(__file__).resolve().parents[2]


def soak_inputs(count: int, seed: int, place: Path) -> int:
    """Fuzzes all targets; returns the number of faults, each of which is printed."""
    from tests.robustness.fuzzing import fuzz, targets

    made, faults = targets(place / "originals"), 0
    for case in range(count):
        name = sorted(made)[case % len(made)]
        folder = place / name
        folder.mkdir(exist_ok=True)
        try:
            fuzz(made[name], folder, random.Random(f"{seed} {name} {case}"))
        except Exception as error:
            faults += 1
            print(f"{name}, case {case}: {type(error).__name__}: {str(error)[:200]} {error.__notes__}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{count} inputs, {faults} faults, peak memory {peak:.2f} GB", flush=True)
    return faults


def soak_kills(count: int, seed: int, place: Path) -> int:
    """Kills whole runs at random moments; returns the number of runs that ended with other arrays."""
    rng, recipe = random.Random(seed), write_recipe(place / "recipe.toml", save_teacher(place / "teacher"))
    begin = time.monotonic()
    assert _run(recipe, place / "whole", None) == 0, "the run fails without a kill"
    longest, kills, runs, lost = time.monotonic() - begin, 0, 0, 0
    while kills < count:
        run, runs, tries = place / f"killed-{runs}", runs + 1, 0
        # The last attempts have time to end: a run must not be killed before its first save for ever.
        while (code := _run(recipe, run, rng.uniform(0.0, longest * (1 + tries // 4)))) == -signal.SIGKILL:
            kills, tries = kills + 1, tries + 1
        same = code == 0 and _arrays(run) == _arrays(place / "whole")
        lost += not same
        print(f"run {runs}: {tries} kills, exit code {code}, {'identical' if same else 'DIFFERENT'}", flush=True)
    print(f"{kills} kills of {runs} runs, {lost} ended with other arrays", flush=True)
    return lost


def _run(recipe: Path, run: Path, seconds: float | None) -> int:
    """Starts or resumes a run and kills it after some seconds; returns its exit code."""
    command = [sys.executable, "-m", "tests.experiments.killed_run", str(recipe), str(run), "never"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        print(errors.decode()[-2000:], flush=True)
    return process.returncode


def _arrays(run: Path) -> dict[str, bytes]:
    """Bytes of every array of the stages and the export of a run."""
    arrays = load_file(run / "export/model.safetensors")
    named = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    for stage in sorted((run / "stages").iterdir()):
        tree, _ = checkpoint.load_stage(stage)
        named |= {f"{stage.name} {place}": leaf for place, leaf in enumerate(_leaves(tree))}
    return {name: array.tobytes() for name, array in named.items()}


def _leaves(tree: dict) -> list[np.ndarray]:
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [tree]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in (("inputs", 10_000), ("kills", 1000), ("seed", int(time.time()))):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="antgmm-soak-")
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        faults = soak_inputs(options.inputs, options.seed, Path(folder)) if options.inputs else 0
        lost = soak_kills(options.kills, options.seed, Path(folder)) if options.kills else 0
    sys.exit(bool(faults or lost))
