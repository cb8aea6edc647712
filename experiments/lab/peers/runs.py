"""Runs the contenders in alternation, each as a process on one core; an interrupted comparison can be resumed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from antgmm_jax.errors import AntgmmError
from experiments.lab.peers.preparation import prepare
from experiments.lab.peers.task import Task
from experiments.run.host.console import bar, say

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".cache" / "peers-venv" / "bin" / "python"
"""Interpreter of the peers' environment, created by `make peers-env`."""


class Contender(NamedTuple):
    """A process of the comparison.

    Attributes:
        label: name in results.
        module: module of this package that runs it.
        mode: last argument of the module.
        peer: whether it runs in the peers' environment.
    """

    label: str
    module: str
    mode: str
    peer: bool


CONTENDERS = {
    "trl": Contender("TRL GKD, grouped by length", "trl_gkd", "group_by_length", True),
    "tunix": Contender("tunix, padded to 32", "tunix_logit", "padded", True),
    "tunix_bucketed": Contender("tunix with our batches", "tunix_logit", "bucketed", True),
    "ours_online": Contender("ours, teacher online", "ours", "online", False),
    "ours_build": Contender("ours, building the cache", "ours", "build", False),
    "ours_cached": Contender("ours, teacher cached", "ours", "cached", False),
}


def run(task: Task, work: Path, *, python: Path = PYTHON, repeats: int = 5) -> dict[str, list[dict[str, Any]]]:
    """Runs all contenders in rounds; existing results are not run again.

    Args:
        task: settings of the task.
        work: folder of weights, text, cache and single results.
        python: interpreter of the peers' environment.
        repeats: rounds.

    Returns:
        Contender -> its record of each round.

    Raises:
        AntgmmError: the peers' environment is missing, the folder belongs to another task, or a contender failed.
    """
    check_environment(python)
    say("peers: text and weights")
    prepare(task, work)
    rounds = work / "rounds"
    rounds.mkdir(exist_ok=True)
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    took: dict[str, float] = {}
    turns = [(turn, name) for turn in range(repeats) for name in CONTENDERS]
    with _one_core(), bar("peers", len(turns)) as update:
        for done, (turn, name) in enumerate(turns):
            update(done, f"round {turn + 1}, {CONTENDERS[name].label}{_left(took, turns[done:])}")
            out = rounds / f"{turn}-{name}.json"
            if not out.exists():
                began = time.perf_counter()
                _start(name, work, out, python)
                took[name] = time.perf_counter() - began
            records[name].append(json.loads(out.read_text()))
        update(len(turns), "")
    return records


def check_environment(python: Path) -> None:
    """Raises AntgmmError if the peers' environment is missing or incomplete."""
    code = "import importlib.metadata as m; [m.version(name) for name in ('trl', 'google-tunix')]"
    if not python.exists() or subprocess.run([python, "-c", code], capture_output=True, check=False).returncode:
        raise AntgmmError(f"no environment with TRL and google-tunix at {python}: run `make peers-env` first")


def _start(name: str, work: Path, out: Path, python: Path) -> None:
    """Runs a contender, with its output in a log file next to its figures."""
    contender, log = CONTENDERS[name], out.with_suffix(".log")
    command = [python if contender.peer else sys.executable, "-m", "experiments.lab.peers.starting", contender.module]
    with log.open("w") as file:
        code = subprocess.run(
            [*command, work.resolve(), out.resolve(), contender.mode],
            env=_environment(work),
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code or not out.exists():
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        raise AntgmmError(f"{contender.label} ended with code {code}: {lines[-1] if lines else 'no output'}; see {log}")


@contextmanager
def _one_core() -> Iterator[None]:
    """A context in which new processes run on one core: the first one that this process may use."""
    if not hasattr(os, "sched_setaffinity"):  # not Linux
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _environment(work: Path) -> dict[str, str]:
    """Environment of all contenders: one thread, a compilation cache, no downloads, and only our package."""
    settings = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str((work / "xla").resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | settings


def _left(took: dict[str, float], turns: list[tuple[int, str]]) -> str:
    """Estimated time left; contenders that have not run yet count with the mean of the others."""
    if not took:
        return ""
    mean = sum(took.values()) / len(took)
    return f", about {sum(took.get(name, mean) for _, name in turns) / 60:.0f} min left"
