"""A run that goes on prepares only what its remaining stages read."""

import dataclasses
from unittest.mock import Mock

import jax
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint
from antgmm_jax.parallel.sharding import make_mesh
from distill import NO_TEACHER
from experiments.run import pipeline
from experiments.run.pipeline import Run
from experiments.run.schema.recipe import dump_recipe, load_recipe
from experiments.run.start import Origin
from tests.experiments.run.test_remedies import STAGES
from tests.experiments.tiny import HEAD

UNREAD = "stage.settle.loss={hard = 1.0, soft = 0.0}"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "recipe.toml").write_text(HEAD.format(teacher=tmp_path / "teacher") + STAGES)
    run = Run(load_recipe(tmp_path / "recipe.toml", [UNREAD]), tmp_path / "run")
    run.origin = Origin("teacher", None, "key", "")
    return run


def finish(run, count):
    for work in run.recipe.work[:count]:
        checkpoint.save_stage(run.folder.stage(work.number, work.stage.name), {}, {"identity": "same"})
    run._remaining = run._unfinished()


@pytest.mark.parametrize(("finished", "made"), [(0, True), (1, True), (2, False), (3, False)])
def test_the_teachers_targets_are_made_for_remaining_stages_only(run, monkeypatch, finished, made):
    finish(run, finished)
    calls = []

    def targets(*_):
        calls.append(1)
        return "source", "frozen"

    monkeypatch.setattr(pipeline, "targets_of", targets)
    shared = run._shared("samples")
    assert bool(calls) is made
    assert (shared.teacher, shared.frozen) == (("source", "frozen") if made else (NO_TEACHER, dict))


def test_the_record_of_a_finished_stage_is_read_once_for_its_model(run, monkeypatch):
    finish(run, 1)
    run._identities, loads, given = ["same"], [], []
    load = checkpoint.load_record

    def counted(directory):
        loads.append(directory)
        return load(directory)

    monkeypatch.setattr(checkpoint, "load_record", counted)
    monkeypatch.setattr(pipeline, "load_after", lambda *about: given.append(about))
    run._stage(run.recipe.work[0], "before", None)
    (((directory, record, before),), (loaded,)) = given, loads
    assert directory == loaded and record["identity"] == "same" and before == "before"


@pytest.mark.parametrize("finished", [0, 1])
def test_only_the_batches_of_remaining_stages_are_shared_by_the_devices(run, monkeypatch, finished):
    stage, *rest = run.recipe.stages
    optimizer = dataclasses.replace(stage.optimizer, batch_size=6)
    run.recipe = run.recipe.model_copy(update={"stages": (stage.model_copy(update={"optimizer": optimizer}), *rest)})
    if finished:
        finish(run, finished)
        (run.folder.path / "recipe.toml").write_text(dump_recipe(run.recipe))
    monkeypatch.setattr(pipeline, "opening", Mock(side_effect=AntgmmError("the batches are checked")))
    message = "the batches are checked" if finished else "stage 'image': batch_size = 6: a batch of 6 rows"
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)), pytest.raises(AntgmmError, match=f"^{message}"):
        run.finish_stages()


@pytest.mark.parametrize("finished", [1, 2])
def test_only_the_steps_of_remaining_stages_are_checked(run, monkeypatch, finished):
    finish(run, finished)
    run.recipe = run.recipe.model_copy(update={"features": "recompute"})
    run.origin, checked = Origin(Mock(), None, "key", ""), []
    samples = Mock(fingerprint="rows")
    samples.rows_to_train.return_value = 16
    for name, fake in {
        "encode_both": lambda *_: (samples, samples),
        "abstract": lambda config: {},
        "after": lambda config, stage: config,
        "check_steps": lambda work, *_: checked.append(work.stage.name),
    }.items():
        monkeypatch.setattr(pipeline, name, fake)
    monkeypatch.setattr(run.folder, "bind", Mock())
    run._encoded((None, None), None)
    assert checked == ["image", "language", "settle"][finished:]
