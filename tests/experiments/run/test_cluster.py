"""A whole run over eight devices, and one of two processes that is killed: both end as the run on one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from antgmm_jax.io import checkpoint
from antgmm_jax.parallel.sharding import make_mesh
from data.maad import source
from experiments.report.write import finish
from experiments.run import stage
from experiments.run.evaluation import evaluate
from experiments.run.pipeline import Run
from experiments.run.samples import Samples, load_processor
from experiments.run.schema.recipe import load_recipe
from experiments.run.student import load_student
from tests.experiments.killed_run import with_each_batch
from tests.experiments.tiny import RECIPE, save_teacher

ROOT = Path(__file__).resolve().parents[3]
# 27 units do not divide by two: they lie whole on every device.
SIZES = '"vision/layers" = 2, "text/embed" = 24, "encoder/mlp" = 27'
# Not with the older emitters of conftest: there the processes' collectives met in another order (gloo: sizes differ).
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]  # PyTorch's and transformers' own


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    text = RECIPE.format(teacher=save_teacher(folder / "teacher"), name="blocks", sizes=SIZES)
    # One phase of training: each compiles a program of its own.
    text = text.replace("mask_steps = 2\nrecover_steps = 2", "mask_steps = 4\nrecover_steps = 0")
    (folder / "recipe.toml").write_text(f"checkpoint_every = 2\n{text}")
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """The run on one device."""
    run = tmp_path_factory.mktemp("alone") / "run"
    return run, finish(Run(load_recipe(recipe), run))


def assert_same(run: Path, expected: Path) -> None:
    """Both runs cut the same units, walked down the same loss and answer alike."""
    mine, theirs = (checkpoint.load_record(folder / "stages" / "01-blocks") for folder in (run, expected))
    assert mine["keep"] == theirs["keep"]
    assert mine["metrics"]["scores"] == theirs["metrics"]["scores"]
    assert [point["step"] for point in mine["metrics"]["history"]] == [4]
    for point, other in zip(mine["metrics"]["history"], theirs["metrics"]["history"], strict=True):
        np.testing.assert_allclose([point[name] for name in other], [*other.values()], rtol=1e-4)
    reports = [json.loads((folder / "report" / "report.json").read_text()) for folder in (run, expected)]
    assert reports[0]["export"]["passed"]
    for name in ("teacher", "student"):
        assert reports[0][name]["scores"] == reports[1][name]["scores"]


class Stopped(Exception):
    pass


def test_a_run_over_eight_devices_goes_on_on_one(recipe, alone, tmp_path, monkeypatch):
    def stopping(_, drawn):
        if drawn > 3:
            raise Stopped

    with monkeypatch.context() as patched, jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        patched.setattr(stage.StageRun, "_train", with_each_batch(stopping))
        with pytest.raises(Stopped):
            finish(Run(load_recipe(recipe), tmp_path / "run"))
    assert (tmp_path / "run" / "steps" / "01-blocks" / "00000002").exists()
    finish(Run(load_recipe(recipe), tmp_path / "run"))
    assert_same(tmp_path / "run", alone[0])


def test_answers_over_eight_devices_are_those_of_one(recipe, alone):
    student, table = load_student(alone[0] / "stages" / "01-blocks"), load_recipe(recipe)
    processor = load_processor(table.teacher.path)
    samples = Samples(source("s", "val", 7), processor, student.config)

    def answers():
        return evaluate(student.config, student.params, samples, processor, max_new_tokens=4)

    expected = answers()
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        student = load_student(alone[0] / "stages" / "01-blocks")
        assert answers() == expected


def start(recipe: Path, run: Path, moments: tuple[str, str]) -> list[int]:
    """Two processes of two devices each, a moment for each; their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.experiments.killed_run", str(recipe), str(run)]
    first, second = (
        subprocess.Popen([*command, moment, "fsdp=2,tensor=2", address, "2", str(process)], cwd=ROOT, env=ENVIRONMENT)
        for process, moment in enumerate(moments)
    )
    try:
        # Without the second the first gives up too, but only once JAX has missed it for a while.
        if second.wait(timeout=900):
            first.kill()
        return [first.wait(timeout=900), second.returncode]
    finally:
        first.kill()
        second.kill()


def test_two_processes_one_killed_both_started_again_end_as_one(recipe, alone, tmp_path):
    run = tmp_path / "run"
    assert start(recipe, run, ("never", "mask"))[1] == -9
    assert [path.name for path in (run / "steps" / "01-blocks").iterdir()] == ["00000002"]
    assert start(recipe, run, ("never", "never")) == [0, 0]
    assert_same(run, alone[0])
