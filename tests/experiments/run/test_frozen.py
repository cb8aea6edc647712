"""Parameters that a stage does not train stay in the two bytes of their files, and nothing else changes."""

import json

import jax
import numpy as np
import pytest

from antgmm_jax.io import checkpoint
from antgmm_jax.io.convert import open_hf, save_hf
from antgmm_jax.pure import abstract
from distill.trainable import by_path, under
from experiments.run import stage as stages
from experiments.run.pipeline import Run
from experiments.run.schema.recipe import load_recipe
from experiments.run.student import whole
from pruning import projected
from tests.experiments.tiny import TOWERS, save_towers

NAMES = ("01-image", "02-text")
STAGES = """[
    {name = "image", frozen = ["language"], sizes = {"vision/mlp" = 16, "bridge/embed" = 16}, mask_steps = 1, \
recover_steps = 2, importance = "magnitude", loss = {hard = 0.0, soft = 0.0, vision = 1.0}},
    {name = "text", frozen = ["vision", "bridge"], adapters = {"language/decoder/blocks/mlp" = 2}, recover_steps = 4},
]""".replace("\n", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two teachers with the same numbers, in files of two and of four bytes, and recipes that cut them."""
    place = save_towers(tmp_path_factory.mktemp("frozen"))
    source, half = place / "teacher", place / "bfloat16"
    save_hf(*open_hf(source), half, like=source, dtype="bfloat16")
    save_hf(*open_hf(half), place / "float32", like=source, dtype="float32")
    for name in ("bfloat16", "float32"):
        (place / f"{name}.toml").write_text(TOWERS.format(teacher=place / name))
    return place


def recipe_of(folder, name, dtype="bfloat16"):
    about = ['teacher.states=["vision"]', f"stage={STAGES}", f'optimizer.dtype="{dtype}"', "checkpoint_every=1"]
    return load_recipe(folder / f"{name}.toml", about)


def params_of(run, stage):
    return by_path(checkpoint.load_stage(run / "stages" / stage)[0]["params"])[0]


@pytest.fixture(scope="module")
def runs(folder):
    """Runs of both teachers; that of the two bytes is stopped in each stage, after a step with checkpoints."""
    train, stopped = stages.train, set()

    def halting(step, state, batches, *, steps, **rest):
        place = rest["last_checkpoint"]
        if steps < 2 or steps in stopped:
            return train(step, state, batches, steps=steps, **rest)
        stopped.add(steps)
        train(step, state, batches, steps=2, **rest)
        assert place is not None
        raise KeyboardInterrupt

    steps = {}
    Run(recipe_of(folder, "float32"), folder / "whole").scores()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "train", halting)
        for _ in range(3):
            try:
                Run(recipe_of(folder, "bfloat16"), folder / "halted").scores()
            except KeyboardInterrupt:
                for record in folder.glob("halted/steps/*/00000002/step.json"):
                    paths = [leaf["path"] for leaf in json.loads(record.read_text())["contents"]["leaves"].values()]
                    steps[record.parts[-3]] = {"/".join(path[1:]) for path in paths if path[0] == "params"}
    return folder / "whole", folder / "halted", steps


@pytest.mark.long
def test_results_equal_those_of_float32_files(runs):
    whole, halted, _ = runs
    for stage in ("01-image", "02-text"):
        first, second = params_of(whole, stage), params_of(halted, stage)
        assert first.keys() == second.keys()
        for path, leaf in first.items():
            assert leaf.dtype == np.float32
            np.testing.assert_array_equal(leaf, second[path].astype(np.float32), err_msg=path)


@pytest.mark.long
def test_only_parameters_that_no_stage_trained_stay_in_two_bytes(runs):
    """The second stage keeps the first one's image side in float32, and adds adapters to maps of two bytes."""
    _, halted, _ = runs
    half = {stage: {p for p, leaf in params_of(halted, stage).items() if leaf.dtype == "bfloat16"} for stage in NAMES}
    language = {path for path in params_of(halted, "01-image") if under(path, "language")}
    assert half["01-image"] == language
    assert half["02-text"] == set()


@pytest.mark.long
def test_checkpoints_of_steps_hold_no_parameters_that_a_stage_leaves_as_they_are(runs):
    """Runs continue from them: the results of the halted run equal those of the whole one."""
    _, halted, steps = runs
    paths = params_of(halted, "02-text").keys()
    language = {path for path in paths if under(path, "language")}
    assert steps["01-image"] == paths - language
    adapters = {path for path in steps["02-text"] if under(path, "adapters")}
    assert adapters
    assert steps["02-text"] - adapters == {path for path in language if not under(path, "language/decoder/blocks/mlp")}


@pytest.mark.long
def test_a_step_in_float32_gets_no_narrow_parameters(folder, monkeypatch):
    held = []
    begin = stages.init_state

    def noted(params, *about, **more):
        held.append({str(leaf.dtype) for leaf in jax.tree.leaves(params)})
        return begin(params, *about, **more)

    monkeypatch.setattr(stages, "init_state", noted)
    Run(recipe_of(folder, "bfloat16", "float32"), folder / "exact").scores()
    assert held == [{"float32"}, {"float32"}]


@pytest.mark.parametrize("kept", [np.arange(16), np.eye(32, 16, dtype=np.float32)], ids=["units", "components"])
def test_a_cut_keeps_the_files_dtype_of_what_is_frozen_and_not_changed(folder, kept):
    """With components of a width, all that has the width is float32, be it frozen or not."""
    student, keep = whole(folder / "bfloat16"), {"vision/embed": kept}
    config, params = student.cut(keep, ("language",))
    dtypes = {top: {str(leaf.dtype) for leaf in jax.tree.leaves(params[top])} for top in params}
    assert dtypes == {"vision": {"float32"}, "bridge": {"float32"}, "language": {"bfloat16"}}
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, abstract(config))
    _, frozen = student.cut(keep, ("vision", "bridge"))
    turned = projected(student.config, ["vision/embed"]) if kept.ndim == 2 else set()
    for path, leaf in by_path(frozen)[0].items():
        narrow = not under(path, "language") and path not in turned
        assert str(leaf.dtype) == ("bfloat16" if narrow else "float32"), path
    assert any(path.startswith("bridge/") for path in by_path(frozen)[0].keys() - turned)


def test_a_model_loads_in_the_dtype_that_is_asked_for(folder):
    student = whole(folder / "bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(student.load())} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(student.begin())} == {"float32"}
