"""Recipes that do not fit their model are refused by name before the run."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

import pruning
from antgmm_jax.axes import resize, sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint
from antgmm_jax.io.convert import load_hf
from antgmm_jax.parallel.sharding import make_mesh
from distill import LossConfig, StepConfig
from experiments.run.checks import check_batches, check_sizes
from experiments.run.cuts import planned
from experiments.run.micro_batches import with_parts
from experiments.run.pipeline import Run
from experiments.run.schema import Stage, Work
from experiments.run.schema.recipe import load_recipe
from experiments.run.student import Student
from tests.experiments.tiny import save_towers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_towers(tmp_path_factory.mktemp("towers"))


def test_components_of_a_width_cut_by_index_are_refused_before_training(folder, tmp_path):
    early = '{name = "early", sizes = {"text/embed" = 24}, importance = "magnitude", recover_steps = 1}'
    late = '{name = "late", sizes = {"text/embed" = 16}, importance = "principal", recover_steps = 1}'
    changes = ["teacher.states=[]", "loss.vision=0.0"]
    recipe = load_recipe(folder / "recipe.toml", [f"stage=[{early}, {late}]", *changes])
    with pytest.raises(
        AntgmmError, match="stage 'late': text/embed was pruned by index before: prune it to components"
    ):
        Run(recipe, tmp_path / "run").scores()
    assert not (tmp_path / "run").exists()
    config, params = load_hf(folder / "teacher")
    whole = Student(config, lambda: params, pruning.identity(config))
    alone = load_recipe(folder / "recipe.toml", [f"stage=[{late}]", *changes]).stages
    check_sizes(whole, alone, whole=whole.keep)
    # This also holds for the first channels of the teacher.
    for kept in (np.arange(1, 25, dtype=np.int32), np.arange(24, dtype=np.int32)):
        cut = whole._replace(config=resize(config, {"text/embed": 24}), keep={**whole.keep, "text/embed": kept})
        with pytest.raises(AntgmmError, match="prune it to components first"):
            check_sizes(cut, alone, whole=whole.keep)


def test_components_of_the_text_width_are_planned_with_a_head_of_its_own(folder):
    config, _ = load_hf(folder / "teacher")
    tied = replace(config, language=replace(config.language, tied=True, scaled_head=True))
    keep = {"text/embed": np.eye(sizes(config)["text/embed"], 16, dtype=np.float32)}
    for method, expected in (("principal", pruning.shrunk_config(tied, keep)), ("activation", None)):
        stage = f'{{name = "a", sizes = {{"text/embed" = 16}}, importance = "{method}", recover_steps = 1}}'
        changes = ["teacher.states=[]", "loss.vision=0.0", f"stage=[{stage}]"]
        (only,) = load_recipe(folder / "recipe.toml", changes).stages
        assert planned(tied, only, {"text/embed": 16}) == (expected or resize(tied, {"text/embed": 16}))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            'sizes = {"vision/embed" = 16}, importance = {"vision/embed" = "principal", "*" = "block_influence"}',
            "importance 'block_influence' cannot score vision/heads, a tied axis: add a pattern for it",
        ),
        (
            'sizes = {"vision/heads" = 1}, mask_steps = 2,'
            ' importance = {"vision/heads" = "magnitude", "*" = "principal"}',
            'importance "principal" cannot close units of vision/embed gradually: set segments = 1, mask_steps = 0',
        ),
    ],
)
def test_importance_of_tied_axes_is_checked_before_the_run(folder, tmp_path, stage, message):
    changes = ["teacher.states=[]", "loss.vision=0.0", f'stage=[{{name = "a", recover_steps = 1, {stage}}}]']
    with pytest.raises(AntgmmError, match=re.escape(message)):
        Run(load_recipe(folder / "recipe.toml", changes), tmp_path / "run").scores()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stage.language.frozen=['visoin']"], "stage 'language': frozen visoin matches no parameter"),
        (["stage.whole.optimizer.rates={encoder=0.5}"], "stage 'whole': rates of encoder matches no parameter"),
        (["stage.whole.optimizer.batch_size=17"], "stage 'whole': batch_size = 17 is more than its 16 rows: reduce it"),
        (
            [
                "stage.language.adapters={language=2,'language/tokens'=2}",
                "stage.language.sizes={}",
                "stage.language.segments=1",
                "stage.language.mask_steps=0",
            ],
            "stage 'language': adapters of language/tokens matches no linear map: top-level names are bridge, language",
        ),
        (
            [
                "stage.language.adapters={language=2}",
                "stage.language.frozen=['vision', 'language/encoder']",
                "stage.language.sizes={}",
                "stage.language.segments=1",
                "stage.language.mask_steps=0",
            ],
            "adapters of language would train language/encoder, which is frozen: name the other parts of language",
        ),
        (
            ["teacher.states=['text']"],
            "teacher.states contains 'text': this model has vision, bridge, encoder",
        ),
        (["teacher.states=['encoder']"], "stage 'image': loss.vision compares states of vision or bridge: add one"),
    ],
)
def test_errors_of_later_stages_are_refused_before_the_first_stage(folder, tmp_path, changes, message):
    with pytest.raises(AntgmmError, match=re.escape(message)):
        Run(load_recipe(folder / "recipe.toml", changes), tmp_path / "run").scores()
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize(
    ("batch", "accumulate", "parts"),
    [(16, 8, 4), (16, 4, 4), (16, 2, 2), (16, 1, 1), (24, 12, 6), (24, 4, 3), (4, 4, 1)],
)
def test_devices_that_do_not_divide_micro_batches_take_fewer_larger_ones(batch, accumulate, parts):
    """Four devices, whose micro-batches have at least a row for each; by hand."""
    table = StepConfig(learning_rate=0.1, batch_size=batch, accumulate=accumulate)
    stage = Stage(name="a", recover_steps=2, loss=LossConfig(hard=1.0), optimizer=table)
    work = Work(1, "stage 'a'", stage, "answers", 0)
    assert with_parts(work) == work
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        check_batches(work)
        assert with_parts(work).stage.optimizer == replace(table, accumulate=parts)
        one_more = work._replace(
            stage=stage.model_copy(update={"optimizer": replace(table, batch_size=18, accumulate=2)})
        )
        with pytest.raises(
            AntgmmError, match="^stage 'a': batch_size = 18: a batch of 18 rows is not divisible by data x"
        ):
            check_batches(one_more)


def test_weights_of_another_shape_are_refused_before_training(folder, tmp_path):
    config, params = load_hf(folder / "teacher")
    whole = Student(config, lambda: params, pruning.identity(config))
    checkpoint.save_stage(tmp_path / "01-facts", {"params": {"vision": params["vision"]}}, {})
    changes = ["teacher.states=[]", "loss.vision=0.0"]
    stage = '{{name = "a", sizes = {{"{0}" = 16}}, weights = "{1}", importance = "magnitude", recover_steps = 1}}'

    def check(axis: str, place: str) -> None:
        stages = load_recipe(folder / "recipe.toml", [f"stage=[{stage.format(axis, place)}]", *changes]).stages
        check_sizes(whole, stages, whole=whole.keep)

    place = str(tmp_path / "01-facts")
    check("decoder/mlp", place)
    with pytest.raises(
        AntgmmError, match=r"^stage 'a': .*01-facts was trained with another shape \(vision.*, not .*\)"
    ):
        check("vision/mlp", place)
    with pytest.raises(AntgmmError, match="^stage 'a': .*01-none does not contain a complete stage"):
        check("decoder/mlp", str(tmp_path / "01-none"))
