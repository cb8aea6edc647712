"""Kills of whole runs with SIGKILL at random moments: `antgmm compress` and `antgmm train`, in one process and in two.

A run starts again after every kill until it ends. The arrays of its stages and its export must then be those of a run
that nobody killed, to the bit.
"""

import random
import shutil
import signal
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tomli_w
from safetensors.numpy import load_file

from antgmm_jax.io import checkpoint
from experiments.lab.servers.starting import free_port
from tests.experiments import forks
from tests.experiments.tiny import RECIPE, TRAINING, save_llava
from tests.flags import ORDERED, QUICK

KILLED = -signal.SIGKILL
LIMIT = 1800.0
"""Seconds after which a run without a kill hangs."""
ALONE = 10.0
"""Maximum seconds for which one of two processes goes on alone."""
SIZES = '"vision/layers" = 2, "text/mlp" = 16'
KINDS = {"compress": 1, "train": 1, "compress-2": 2}
"""Kind of run -> number of its processes."""


def recipe_of(kind: str, teacher: Path) -> dict[str, Any]:
    """Returns the recipe of a kind of run: a small LLaVA, checkpoints after each step, no times in the report."""
    if kind == "train":
        model = {"preset": "llava-tiny", "sizes": {"vision/layers": 2, "text/layers": 1}}
        return tomllib.loads(TRAINING) | {"model": model}
    recipe = tomllib.loads(RECIPE.format(teacher=teacher, name="cut", sizes=SIZES))
    return recipe | {"checkpoint_every": 1, "report": {"latency": False}}


class Call(NamedTuple):
    """What a process of a run does: a function, and its arguments."""

    function: Callable[..., None]
    arguments: Sequence[str | Path]


class Runs:
    """Runs of one kind, one after another.

    Args:
        name: name of the kind.
        place: folder of the runs.
        calls: folder of a run -> call of each process.

    Attributes:
        kills: starts that were killed.
        lost: runs that failed after a kill.
        different: runs that ended with other arrays.
    """

    def __init__(self, name: str, place: Path, calls: Callable[[Path], list[Call]]):
        self._name, self._place, self._calls = name, place, calls
        self.kills = self.runs = self.lost = self.different = self._tries = 0
        begin = time.monotonic()
        assert self._start(place / "whole", LIMIT, None) == 0, f"{name} fails without a kill"
        self._seconds, self._expected = time.monotonic() - begin, arrays_of(place / "whole")
        print(f"{name}: {self._seconds:.0f} s without a kill", flush=True)

    def attempt(self, rng: random.Random) -> None:
        """Starts or resumes a run, and kills it at a random moment unless it ends before."""
        # A resumed run is soon where it was, so kills come early; each attempt has more time, so that every run ends.
        begin = time.monotonic()
        code = self._start(self._run, rng.uniform(0.0, self._seconds * (0.5 + self._tries / 8)), rng)
        if code == KILLED:
            self.kills, self._tries = self.kills + 1, self._tries + 1
        else:
            if not self._tries:  # it found all programs, or the machine is less busy now
                self._seconds = min(self._seconds, time.monotonic() - begin)
            self._judge(code)

    def complete(self) -> None:
        """Resumes a killed run without another kill."""
        if self._tries:
            self._judge(self._start(self._run, LIMIT, None))

    def summary(self) -> str:
        """The figures of all runs, in one line."""
        ends = f"{self.lost} lost, {self.different} with other arrays"
        return f"{self._name}: {self.kills} kills of {self.runs} runs, {ends}"

    @property
    def _run(self) -> Path:
        return self._place / f"killed-{self.runs}"

    def _judge(self, code: int) -> None:
        same = code == 0 and arrays_of(self._run) == self._expected
        self.lost, self.different = self.lost + (code != 0), self.different + (code == 0 and not same)
        end = "identical" if same else "DIFFERENT"
        print(f"{self._name}, run {self.runs}: {self._tries} kills, exit code {code}, {end}", flush=True)
        if same:
            shutil.rmtree(self._run)
        self.runs, self._tries = self.runs + 1, 0

    def _start(self, run: Path, seconds: float, rng: random.Random | None) -> int:
        """Starts or resumes a run, and kills it after some seconds.

        With two processes one of them is killed, or both; the other one goes on for a while, and is then killed too.

        Returns:
            0, `KILLED`, or the exit code of a process that failed.
        """
        with tempfile.NamedTemporaryFile() as errors:
            processes = []
            try:
                for call in self._calls(run):
                    processes.append(forks.forked(call.function, *call.arguments, output=errors.name))
                struck = not _ended(processes, seconds) and rng is not None
                if struck:
                    for victim in rng.sample(processes, rng.randint(1, len(processes))):
                        victim.kill()
                        victim.join()
                    _ended([each for each in processes if each.exitcode != KILLED], rng.uniform(0.0, ALONE))
            finally:
                for process in processes:
                    process.kill()
            for process in processes:
                process.join()
            codes = [process.exitcode for process in processes]
            failed = [code for code in codes if code not in (0, KILLED)]
            if failed and not (struck and len(codes) > 1):  # after a kill the other process may fail too
                print(Path(errors.name).read_text(errors="replace")[-3000:], flush=True)
                return failed[0]
        return KILLED if KILLED in codes else 0


def _ended(processes: Sequence[BaseProcess], seconds: float) -> bool:
    """Whether all processes end, or one of them fails, within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        codes = [process.exitcode for process in processes]
        if None not in codes or any(codes):
            return True
        time.sleep(0.02)
    return False


def runs_of(name: str, place: Path) -> Runs:
    """Returns runs of a kind, a key of `KINDS`, in a folder."""
    teacher, recipe, count = save_llava(place / "teacher"), place / "recipe.toml", KINDS[name]
    recipe.write_text(tomli_w.dumps(recipe_of(name, teacher)))

    def calls(run: Path) -> list[Call]:
        words = [recipe, run, "never"]
        if count == 1:
            return [Call(_whole_run, [place / "programs", QUICK, *words])]
        address = f"127.0.0.1:{free_port()}"
        return [
            Call(_whole_run, [place / "programs", ORDERED, *words, f"fsdp={count}", address, f"{count}", f"{number}"])
            for number in range(count)
        ]

    return Runs(name, place, calls)


def _whole_run(programs: Path, flags: str, *words: str) -> None:
    """A run that stores its compiled programs, as the commands do: a kill may come while one is written."""
    jax.config.update("jax_compilation_cache_dir", f"{programs}")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    forks.run(words, flags)


def soak_kills(count: int, seed: int, place: Path, names: Sequence[str] = (*KINDS,)) -> int:
    """Kills whole runs of the given kinds, drawn at random; returns how many were lost or ended with other arrays."""
    return killed([runs_of(name, place / name) for name in names], count, random.Random(seed))


def killed(drawn: Sequence[Runs], count: int, rng: random.Random) -> int:
    """Kills runs until there are `count` kills, ends them, and returns how many were lost or ended otherwise."""
    while sum(runs.kills for runs in drawn) < count:
        rng.choice(drawn).attempt(rng)
    for runs in drawn:
        runs.complete()
        print(runs.summary(), flush=True)
    return sum(runs.lost + runs.different for runs in drawn)


def arrays_of(run: Path) -> dict[str, bytes]:
    """Bytes of every array of the stages and the export of a run."""
    arrays = load_file(run / "export/model.safetensors")
    named = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    for stage in sorted((run / "stages").iterdir()):
        tree, _ = checkpoint.load_stage(stage)
        named |= {f"{stage.name} {place}": leaf for place, leaf in enumerate(_leaves(tree))}
    return {name: array.tobytes() for name, array in named.items()}


def _leaves(tree: dict) -> list[np.ndarray]:
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [tree]
