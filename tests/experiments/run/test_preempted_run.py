"""A run that SIGTERM ends in every phase, and continues each time, equals the run without interruptions."""

import errno
import json
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint
from antgmm_jax.parallel import preemption
from experiments.report.write import finish
from experiments.run import calibration, stage, targets
from experiments.run.export import exporting
from experiments.run.host.meshes import devices
from experiments.run.pipeline import Run
from experiments.run.schema.recipe import load_recipe
from experiments.run.scores import scoring
from tests.experiments.killed_run import with_each_batch
from tests.experiments.tiny import RECIPE, save_llava

SIZES = '"vision/layers" = 1, "text/embed" = 24'

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]  # warnings of PyTorch and transformers


def terminate() -> None:
    """Sends SIGTERM to this process, and waits until it is noticed."""
    os.kill(os.getpid(), signal.SIGTERM)
    while not preemption.requested():
        time.sleep(0.01)


def before(function):
    """The function, called after SIGTERM."""

    def called(*arguments, **options):
        terminate()
        return function(*arguments, **options)

    return called


def preempted(recipe: Path, run: Path, patch) -> None:
    """Starts or continues the run until the patched moment."""
    with pytest.MonkeyPatch.context() as patched, devices("", "", 1, 0):
        patch(patched)
        with pytest.raises(preemption.Preempted):
            finish(Run(load_recipe(recipe), run))
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def during_cache(patched):
    patched.setattr(targets.distill, "build_cache", before(targets.distill.build_cache))


def during_importance(patched):
    patched.setattr(calibration.pruning, "taylor", before(calibration.pruning.taylor))


def during_scores(patched):
    patched.setattr(scoring, "evaluate", before(scoring.evaluate))


def during_export(patched):
    patched.setattr(exporting, "exported", before(exporting.exported))


def at_step(number: int):
    def patch(patched):
        act = lambda _, drawn: terminate() if drawn == number + 1 else None  # noqa: E731
        patched.setattr(stage.StageRun, "_train", with_each_batch(act))

    return patch


def test_a_run_preempted_in_every_phase_ends_like_one_that_was_not(tmp_path):
    text = RECIPE.format(teacher=save_llava(tmp_path / "teacher"), name="blocks", sizes=SIZES)
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    text = text.replace('name = "blocks"', 'name = "blocks"\nsegments = 2')
    recipe.write_text(f"{text}\n[report]\nlatency = false\n")
    expected = finish(Run(load_recipe(recipe), tmp_path / "whole"))

    def steps():
        return sorted(path.name for path in (run / "steps" / "01-blocks").iterdir())

    preempted(recipe, run, during_cache)
    assert [*run.glob("cache/*.partial/*.array_record")]  # what it had computed
    preempted(recipe, run, during_importance)
    assert not [*run.glob("cache/*.partial")] and not (run / "steps").exists()
    preempted(recipe, run, at_step(2))
    assert steps() == ["00000003"]
    preempted(recipe, run, during_importance)  # of the second segment
    assert steps() == ["00000003", "00000004"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint.ocp, "save_async", full_disk)
        with pytest.raises(AntgmmError, match=r"no space left on the disk; .*; earlier checkpoints are intact$"):
            finish(Run(load_recipe(recipe), run))
    assert steps() == ["00000003", "00000004"]
    preempted(recipe, run, at_step(6))
    preempted(recipe, run, during_scores)
    assert steps() == ["00000007", "00000008"]
    preempted(recipe, run, during_export)  # it leaves in the export check, and writes nothing
    assert not (run / "steps" / "01-blocks").exists()
    assert not (run / "export").exists() and not (run / ".export.unchecked").exists()
    preempted(recipe, run, during_scores)  # of the report
    assert (run / "export").exists() and not (run / "report" / "report.json").exists()
    report = finish(Run(load_recipe(recipe), run))

    trees = [checkpoint.load_stage(folder / "stages" / "01-blocks") for folder in (run, tmp_path / "whole")]
    for mine, other in zip(jax.tree.leaves(trees[0][0]), jax.tree.leaves(trees[1][0]), strict=True):
        np.testing.assert_array_equal(mine, other)
    for name in ("keep", "position"):
        assert trees[0][1][name] == trees[1][1][name]
    assert trees[0][1]["metrics"]["history"] == trees[1][1]["metrics"]["history"]
    assert report["student"]["scores"] == expected["student"]["scores"]
    assert json.loads((run / "status.json").read_text())["state"] == "complete"
