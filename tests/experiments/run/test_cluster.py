"""Runs on eight devices and in two processes, interrupted and resumed, end like the run on one device."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from antgmm_jax.io import checkpoint
from antgmm_jax.io.loading import load_processor
from antgmm_jax.parallel import preemption
from antgmm_jax.parallel.sharding import make_mesh
from data.maad import source
from experiments.lab.servers.starting import free_port
from experiments.report.write import finish
from experiments.run.pipeline import Run
from experiments.run.rows.samples import Samples
from experiments.run.schema.recipe import load_recipe
from experiments.run.scores.evaluation import evaluate
from experiments.run.student import load_student
from tests.experiments.forks import forked_run
from tests.experiments.tiny import RECIPE, save_llava
from tests.flags import ORDERED

# 27 units are not divisible by two: every device holds all of them.
SIZES = '"vision/layers" = 1, "text/embed" = 24, "text/mlp" = 27'

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]  # warnings of PyTorch and transformers


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    text = RECIPE.format(teacher=save_llava(folder / "teacher"), name="blocks", sizes=SIZES)
    # One phase of training, because each phase compiles a program.
    text = text.replace("mask_steps = 2\nrecover_steps = 2", "mask_steps = 4\nrecover_steps = 0")
    (folder / "recipe.toml").write_text(f"checkpoint_every = 2\n{text}\n[report]\nlatency = false\n")
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """The folder and the report of the run on one device."""
    run = tmp_path_factory.mktemp("alone") / "run"
    return run, finish(Run(load_recipe(recipe), run))


def assert_close(mine, theirs):
    """Asserts that scores are equal; several devices add up token losses in another order."""
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), mine, theirs)


def assert_same(run: Path, expected: Path) -> None:
    """Asserts that both runs have equal cuts, losses and scores."""
    mine, theirs = (checkpoint.load_record(folder / "stages" / "01-blocks") for folder in (run, expected))
    assert mine["keep"] == theirs["keep"]
    assert_close(mine["metrics"]["scores"], theirs["metrics"]["scores"])
    assert [point["step"] for point in mine["metrics"]["history"]] == [4]
    for point, other in zip(mine["metrics"]["history"], theirs["metrics"]["history"], strict=True):
        np.testing.assert_allclose([point[name] for name in other], [*other.values()], rtol=1e-4)
    reports = [json.loads((folder / "report" / "report.json").read_text()) for folder in (run, expected)]
    assert reports[0]["export"]["passed"]
    for name in ("teacher", "student"):
        assert_close(reports[0][name]["scores"], reports[1][name]["scores"])


def test_a_run_on_eight_devices_resumes_on_one(recipe, alone, tmp_path):
    words = str(recipe), str(tmp_path / "run"), "mask", "data=2,fsdp=2,tensor=2", "", "1", "0"
    eight = forked_run(*words, flags=ORDERED)
    eight.join(900)
    assert eight.exitcode == -9
    assert (tmp_path / "run" / "steps" / "01-blocks" / "00000002").exists()
    finish(Run(load_recipe(recipe), tmp_path / "run"))
    assert_same(tmp_path / "run", alone[0])


def test_answers_on_eight_devices_equal_those_on_one(recipe, alone):
    student, table = load_student(alone[0] / "stages" / "01-blocks"), load_recipe(recipe)
    processor = load_processor(table.teacher.path)
    samples = Samples(source("s", "val", 7), processor, student.config)

    def answers():
        return evaluate(student.config, student.load(), samples, processor, max_new_tokens=4)

    expected, texts = answers()
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        student = load_student(alone[0] / "stages" / "01-blocks")
        scores, again = answers()
    assert_close(scores, expected)
    assert again == texts


def start(recipe: Path, run: Path, moments: tuple[str, str]) -> list[int]:
    """Runs two processes of two devices each, with a moment to die for each; returns their exit codes."""
    address = f"127.0.0.1:{free_port()}"
    first, second = (
        forked_run(str(recipe), str(run), moment, "fsdp=2,tensor=2", address, "2", str(process), flags=ORDERED)
        for process, moment in enumerate(moments)
    )
    try:
        # Without the second process the first one fails too, but only after JAX's timeout. A preempted one still saves.
        second.join(900)
        if second.exitcode not in (0, preemption.EXIT_CODE):
            first.kill()
        first.join(900)
        return [first.exitcode, second.exitcode]
    finally:
        first.kill()
        second.kill()


def test_two_processes_resume_after_one_was_killed(recipe, alone, tmp_path):
    run = tmp_path / "run"
    assert start(recipe, run, ("never", "mask"))[1] == -9
    assert [path.name for path in (run / "steps" / "01-blocks").iterdir()] == ["00000002"]
    assert start(recipe, run, ("never", "never")) == [0, 0]
    assert_same(run, alone[0])


def test_sigterm_to_one_of_two_processes_saves_in_both_and_another_mesh_resumes(recipe, alone, tmp_path):
    """The signal reaches one process before step 1; both save the same later step, and one device goes on."""
    run = tmp_path / "run"
    assert start(recipe, run, ("never", "preempted")) == [preemption.EXIT_CODE] * 2
    saved = max(int(step.name) for step in (run / "steps" / "01-blocks").iterdir())
    assert 2 <= saved <= 4
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"
    finish(Run(load_recipe(recipe), run))
    assert_same(run, alone[0])
