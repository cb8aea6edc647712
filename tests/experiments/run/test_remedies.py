"""What messages say where a remedy needs another recipe can be done: in another folder, from a finished stage."""

from types import SimpleNamespace

import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint
from distill import Diverged
from experiments.auto.advice import POINTS, advice
from experiments.run import pipeline
from experiments.run.folder import RunFolder
from experiments.run.pipeline import Run
from experiments.run.progress.watching import NOTHING
from experiments.run.schema.recipe import dump_recipe, load_recipe
from tests.experiments.tiny import HEAD

STAGES = """
[[stage]]
name = "image"
frozen = ["language"]
recover_steps = 2
sizes = { "vision/mlp" = 16 }
[[stage]]
name = "language"
frozen = ["vision", "bridge"]
recover_steps = 3
sizes = { "decoder/mlp" = 16 }
[[stage]]
name = "settle"
recover_steps = 4
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "recipe.toml").write_text(HEAD.format(teacher=tmp_path / "teacher") + STAGES)
    return tmp_path


def finish(folder, recipe, count):
    """Writes the first stages of a run, with losses that stay."""
    folder.path.mkdir()
    (folder.path / "recipe.toml").write_text(dump_recipe(recipe))
    for work in recipe.work[:count]:
        metrics = {"history": [{"loss": 1.0}] * POINTS}
        checkpoint.save_stage(folder.stage(work.number, work.stage.name), {}, {"metrics": metrics})


@pytest.mark.parametrize(
    ("change", "reused"),
    [
        ("stage.settle.optimizer.learning_rate=0.1", "02-language"),
        ("stage.language.optimizer.learning_rate=0.1", "01-image"),
        ("stage.image.recover_steps=3", ""),
    ],
)
def test_a_refused_recipe_is_told_what_it_can_start_from(place, change, reused):
    path, folder = place / "recipe.toml", RunFolder(place / "run")
    finish(folder, load_recipe(path), 2)
    with pytest.raises(AntgmmError, match="is a run of another recipe") as refused:
        folder.check(load_recipe(path, [change]))
    stage = folder.path / "stages" / reused
    hint = reused and f'; in another folder, a recipe that begins after {reused} may have parent = "{stage}"'
    assert str(refused.value).endswith(f"choose another folder or remove it, and with --mirror another URL{hint}")


def test_advice_about_a_stage_names_the_stage_before_it(place):
    recipe, folder = load_recipe(place / "recipe.toml"), RunFolder(place / "run")
    finish(folder, recipe, 3)
    first, second, third = advice(recipe, folder.path)
    assert first.endswith("more steps in another --run")
    for line, before in ((second, "01-image"), (third, "02-language")):
        parent = f'parent = "{folder.path / "stages" / before}"'
        assert line.endswith(f"more steps in another --run, of a recipe that begins with this stage and has {parent}")


def test_a_stage_that_diverges_names_the_stage_before_it(place, monkeypatch):
    def diverge(self, start):
        raise Diverged("training stopped; lower the learning rate")

    recipe = load_recipe(place / "recipe.toml")
    monkeypatch.setattr(pipeline, "with_visits", lambda work, *_: work)
    monkeypatch.setattr(pipeline.StageRun, "run", diverge)
    run = Run(recipe, place / "run")
    run.origin = SimpleNamespace(teacher=None, parent="")
    run._identities, run._watcher = [""] * 3, SimpleNamespace(stage=lambda *_: NOTHING)
    samples = SimpleNamespace(rows=SimpleNamespace(index=SimpleNamespace(names=())))
    for number, end in ((1, "in another --run"), (2, f'has parent = "{run.folder.stage(1, "image")}"')):
        with pytest.raises(Diverged) as raised:
            run._trained(recipe.work[number - 1], None, SimpleNamespace(samples=samples), dict)
        assert str(raised.value).startswith("training stopped; lower the learning rate in another --run")
        assert str(raised.value).endswith(end)
