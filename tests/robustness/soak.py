"""A long round: `python -m tests.robustness.soak [--inputs N] [--kills N] [--seed S]`, or `make soak`.

Inputs are damaged as in `fuzzing`, runs are killed as in `kills`.
"""

import argparse
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from tests.robustness.kills import KINDS, soak_kills


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in (("inputs", 10_000), ("kills", 1000), ("seed", int(time.time()))):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="antgmm-soak-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        faults = soak_inputs(options.inputs, options.seed, Path(folder)) if options.inputs else 0
        lost = soak_kills(options.kills, options.seed, Path(folder), options.kinds) if options.kills else 0
    sys.exit(bool(faults or lost))
