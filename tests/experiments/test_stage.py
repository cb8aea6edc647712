"""Stages by tower: what is frozen stays bit for bit, image features stand in where nothing under them moves."""

import jax
import numpy as np
import pytest

from antgmm_jax import checkpoint
from antgmm_jax.config import sizes
from antgmm_jax.errors import AntgmmError
from experiments import stage as stages
from experiments.pipeline import Run, load_student
from experiments.recipe import load_recipe
from tests.experiments.tiny import save_teacher

RECIPE = """
calibration_batches = 1
checkpoint_every = 2
[teacher]
path = "{teacher}"
states = ["bridge"]
[data]
kind = "maad"
tier = "s"
samples = 16
[loss]
soft = 1.0
[optimizer]
kind = "muon"
learning_rate = 1e-2
batch_size = 8
[evaluate]
max_new_tokens = 4
[evaluate.data]
split = "val"
samples = 8
[[stage]]
name = "image"
frozen = ["language"]
recover_steps = 2
loss = {{ hard = 0.0, soft = 0.0, vision = 1.0 }}
importance = "magnitude"
sizes = {{ "vision/mlp" = 16, "bridge/embed" = 16 }}
[[stage]]
name = "language"
frozen = ["vision", "bridge/stack", "bridge/norm", "bridge/queries"]
mask_steps = 1
recover_steps = 3
sizes = {{ "decoder/mlp" = 16, "encoder/mlp" = 16, "text/embed" = 16 }}
[[stage]]
name = "whole"
recover_steps = 2
optimizer.dtype = "bfloat16"
optimizer.remat = "full"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("towers")
    (made / "recipe.toml").write_text(RECIPE.format(teacher=save_teacher(made / "teacher")))
    return made


@pytest.fixture(scope="module")
def run(folder):
    made: list[tuple[str, int]] = []
    computed: list[tuple[str, str]] = []
    whole, step, pure = stages.image_features, stages.make_step, stages.functional
    policies = {}

    def remembered(config, remat="dots"):
        model = pure(config, remat)
        policies[id(model)] = remat
        return model

    def counted(config, params, samples):
        made.append((stages.__name__, len(samples)))
        return whole(config, params, samples)

    def noted(model, *arguments, dtype, **rest):
        computed.append((dtype.name, policies[id(model)]))
        return step(model, *arguments, dtype=dtype, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "image_features", counted)
        patch.setattr(stages, "make_step", noted)
        patch.setattr(stages, "functional", remembered)
        scores = Run(load_recipe(folder / "recipe.toml"), folder / "run").scores()
    students = [load_student(path) for path in sorted((folder / "run" / "stages").iterdir())]
    return scores, students, made, computed


def same(first, second) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_frozen_tower_stays_and_the_others_move(run):
    _, (image, language, whole), *_ = run
    # The second stage cuts the width that the bridge writes to, so its last map is not compared.
    for part in ("queries", "norm", "stack"):
        assert same(image.params["bridge"][part], language.params["bridge"][part])
        assert not same(language.params["bridge"][part], whole.params["bridge"][part])
    assert same(image.params["vision"], language.params["vision"])
    assert not same(language.params["vision"], whole.params["vision"])
    assert not same(language.params["language"], whole.params["language"])


def test_the_first_stage_leaves_the_language_model_the_teachers(run):
    _, (image, *_), *_ = run
    assert sizes(image.config)["bridge/embed"] == 16
    assert image.keep["decoder/mlp"].shape[-1] == 48


def test_features_are_computed_once_and_only_where_the_image_side_stands_still(run):
    _, _, made, _ = run
    assert made == [("experiments.stage", 16)]


def test_a_stage_is_computed_in_its_own_dtype_with_its_own_remat_and_left_in_float32(run):
    _, (*_, whole), _, computed = run
    assert computed == [("float32", "dots")] * 3 + [("bfloat16", "full")]  # the second stage has two halves
    assert {leaf.dtype for leaf in jax.tree.leaves(whole.params)} == {np.dtype("float32")}


def test_a_stage_without_sizes_only_distils(run):
    _, (_, language, whole), *_ = run
    assert sizes(language.config) == sizes(whole.config)
    assert all(np.array_equal(index, whole.keep[axis]) for axis, index in language.keep.items())


def test_what_a_stage_cannot_do_is_refused(run, tmp_path):
    text = RECIPE.format(teacher=tmp_path)
    path = tmp_path / "recipe.toml"
    for change, fault in (
        ("stage.whole.mask_steps=1", "a stage without sizes only distils"),
        ("stage.whole.recover_steps=0", "a stage without sizes only distils"),
        ("stage.language.weights=random", "weights that are not kept"),
    ):
        path.write_text(text)
        with pytest.raises(AntgmmError, match=fault):
            load_recipe(path, [change])


def test_what_is_repeated_meets_its_own_targets(folder, tmp_path):
    """From a cache, which goes by the row, as from the teacher itself, which reads the batch."""
    changes = ["stage.image.repeat={price=5, brand=3}", "stage.image.recover_steps=1"]
    changes += ["stage.image.loss={hard=0.0,soft=1.0,vision=1.0}", "stage.image.optimizer.batch_size=4"]
    curves = []
    for mode in ("cache", "online"):
        recipe = load_recipe(folder / "recipe.toml", [*changes, f"teacher.mode={mode}"])
        recipe = recipe.model_copy(update={"stages": recipe.stages[:1]})
        Run(recipe, tmp_path / mode).scores()
        record = checkpoint.load_record(tmp_path / mode / "stages" / "01-image")
        curves.append([[point[name] for name in ("soft", "vision")] for point in record["metrics"]["history"]])
    # The cache holds bfloat16.
    np.testing.assert_allclose(*curves, rtol=2e-2)
    with pytest.raises(AntgmmError, match="stage 'image': no question is of type prise: the data has brand, "):
        Run(load_recipe(folder / "recipe.toml", ["stage.image.repeat={prise=2}"]), tmp_path / "none").scores()
