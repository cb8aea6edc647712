"""Cuts of several stages of one teacher are merged axis by axis, or refused by name."""

import json
import shutil

import jax
import numpy as np
import pytest

import pruning
from antgmm_jax.axes import sizes, to_dict
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.blip2.presets import sized as blip2_t5
from antgmm_jax.io import checkpoint
from antgmm_jax.io.books import write_book
from antgmm_jax.io.convert import load_hf
from antgmm_jax.pure import functional
from experiments.report.write import finish
from experiments.run import recombining as recombine
from experiments.run.folder import status_of
from experiments.run.recombining import Source
from experiments.run.schema.recipe import load_recipe
from experiments.run.student import config_of, load_student, teacher_key
from tests.experiments.tiny import save_teacher, write_recipe

CONFIG = blip2_t5(
    vision=(4, 32, 2, 6),
    bridge=(2, 32, 2, 6),
    text=(2, 2, 32, 2, 6),
    head_dims=(16, 16, 16),
    image=32,
    patch=16,
    queries=4,
    vocab=64,
    image_token=3,
)
KEY = "teacher"


@pytest.fixture
def stage(tmp_path):
    """A function that saves CONFIG after a sequence of `cuts` as a finished stage."""

    def save(name: str, *cuts, key: str = KEY, config=CONFIG):
        keep = pruning.identity(config)
        for cut in cuts:
            keep = pruning.compose(keep, {axis: pruning.as_kept(kept) for axis, kept in cut.items()})
        directory = tmp_path / name
        checkpoint.save_stage(directory, {"params": {"x": np.zeros(1)}}, {"teacher": key, "keep": keep})
        return directory

    return save


DEPTH = {"vision/layers": [0, 3], "bridge/mlp": np.tile([0, 2, 5], (2, 1))}
WIDTH = {"vision/mlp": np.tile([1, 2, 4], (4, 1))}


def test_a_source_is_a_stage_and_patterns():
    assert Source.parse("runs/a/stages/01-x:*/mlp,*/heads") == (
        recombine.Path("runs/a/stages/01-x"),
        ("*/mlp", "*/heads"),
    )
    assert Source.parse("runs/a/stages/01-x") == (recombine.Path("runs/a/stages/01-x"), ("*",))


def test_each_axis_comes_from_the_source_that_names_it(stage):
    a, b = stage("a", DEPTH), stage("b", WIDTH)
    keep, origin = recombine.joined(CONFIG, KEY, [Source(a, ("*/layers",)), Source(b, ("*",))])
    assert origin == {"vision/layers": str(a), "vision/mlp": str(b)}
    assert keep["vision/layers"].tolist() == [0, 3]
    assert keep["vision/mlp"].tolist() == [[1, 2, 4]] * 4
    # Other axes stay whole: no source gives bridge/mlp.
    smaller, params = pruning.shrink(CONFIG, functional(CONFIG).init(jax.random.key(0)), keep)
    changed = {axis: n for axis, n in sizes(smaller).items() if n != sizes(CONFIG)[axis]}
    assert changed == {"vision/layers": 2, "vision/mlp": 3}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["vision"]["stack"])} == {2}


def test_a_basis_is_restored_bit_for_bit_and_merges_with_other_cuts(stage):
    basis = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    a, b = stage("a", {"vision/embed": basis, "vision/heads": np.zeros((4, 1), np.int32)}), stage("b", WIDTH)
    keep, origin = recombine.joined(CONFIG, KEY, [Source(a, ("*",)), Source(b, ("*",))])
    assert origin == {"vision/embed": str(a), "vision/heads": str(a), "vision/mlp": str(b)}
    assert keep["vision/embed"].dtype == np.float32
    np.testing.assert_array_equal(keep["vision/embed"], basis)
    smaller, params = pruning.shrink(CONFIG, functional(CONFIG).init(jax.random.key(0)), keep)
    assert [sizes(smaller)[axis] for axis in ("vision/embed", "vision/heads", "vision/mlp")] == [16, 1, 3]
    assert params["vision"]["patch"].shape[-1] == 16


@pytest.mark.parametrize(
    ("cuts", "patterns", "message"),
    [
        ((WIDTH, WIDTH), ("*", "*"), "vision/mlp is pruned in both {0} and {1}"),
        (
            (DEPTH, WIDTH),
            ("*/heads", "*"),
            r"{0} prunes no axis that matches '\*/heads': it prunes bridge/mlp, vision/layers",
        ),
    ],
)
def test_conflicting_or_unmatched_sources_are_refused_by_name(stage, cuts, patterns, message):
    stages = [stage(name, cut) for name, cut in zip("ab", cuts, strict=True)]
    with pytest.raises(AntgmmError, match=message.format(*stages)):
        recombine.joined(CONFIG, KEY, [Source(s, (p,)) for s, p in zip(stages, patterns, strict=True)])


def test_a_layer_without_a_row_is_named_with_both_sources(stage):
    # The second run kept only layers 0 and 1 before it chose inner units, so layer 3 has no units.
    a = stage("a", DEPTH)
    b = stage("b", {"vision/layers": [0, 1]}, {"vision/mlp": np.tile([1, 2, 4], (2, 1))})
    with pytest.raises(AntgmmError, match=r"no indices for the kept layers \[3\] of vision/layers") as caught:
        recombine.joined(CONFIG, KEY, [Source(a, ("vision/layers",)), Source(b, ("*/mlp",))])
    assert f"vision/layers comes from {a}" in str(caught.value)
    assert f"vision/mlp comes from {b}" in str(caught.value)


def test_merged_sizes_of_an_illegal_model_are_refused(stage):
    # In the image encoder a head has 16 channels of the width.
    cut = stage("a", {"vision/embed": np.arange(16), "vision/heads": np.zeros((4, 1), np.int32)})
    with pytest.raises(AntgmmError, match="the merged sizes are not a legal model"):
        recombine.joined(CONFIG, KEY, [Source(cut, ("*/heads",))])


def test_a_stage_of_another_teacher_is_refused(stage):
    with pytest.raises(AntgmmError, match="was cut from another teacher"):
        recombine.joined(CONFIG, KEY, [Source(stage("a", DEPTH, key="other"), ("*",))])


def test_a_record_with_a_valid_checksum_is_checked(stage, tmp_path):
    def written(**change):
        directory = stage("changed", DEPTH)
        record = checkpoint.load_record(directory)
        contents = json.loads((directory / "stage.json").read_text())["contents"]
        write_book(directory / "stage.json", {**record, "contents": contents, **change})
        return directory

    for change, message in (
        ({"keep": None}, "no record of what it keeps of which teacher"),
        ({"teacher": 5}, "no record of what it keeps of which teacher"),
        ({"keep": {"vision/layers": [0, "a"]}}, "no lists of indices"),
        ({"keep": {"vision/planets": [0]}}, "keeps what the teacher does not have .unknown axis 'vision/planets'"),
        ({"keep": {"vision/layers": [0, 9]}}, r"keeps what the teacher does not have .*within 0\.\.3"),
    ):
        directory = written(**change)
        with pytest.raises(AntgmmError, match=message):
            recombine.joined(CONFIG, KEY, [Source(directory, ("*",))])
        shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((("vision", "stack", "layers"), value) for value in (10**9, -1, 0, 1.5, "a", None, [1])),
        *((("vision", "stack", "norm"), value) for value in (5, "batch")),
        *((("vision", "stack", "local_layers"), value) for value in (5, ["a"])),
        *(
            ((name,), value)
            for name, value in (("family", [1]), ("vision", None), ("moon", 1), ("image_token", 10**12))
        ),
    ],
)
def test_a_config_with_a_valid_checksum_is_checked(tmp_path, place, value):
    config = json.loads(json.dumps(to_dict(CONFIG)))
    assert config_of(tmp_path, {"config": config}) == CONFIG
    inner = config
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    with pytest.raises(AntgmmError, match=r"stage\.json.*(specify another stage|correct it)$"):
        config_of(tmp_path, {"config": config})


def test_the_recipe_keeps_all_but_its_stages(tmp_path):
    path = write_recipe(tmp_path / "r.toml", tmp_path / "t")
    recipe = recombine.distillation(path, tmp_path / "stages" / "00-recombined", 7, ["optimizer.batch_size=4"])
    assert [(s.name, s.steps, s.optimizer.batch_size, s.loss.soft) for s in recipe.stages] == [("distil", 7, 4, 1.0)]
    assert recipe.parent == str(tmp_path / "stages" / "00-recombined")
    assert recipe.data == load_recipe(path).data
    # States and most probable tokens that only a stage of the recipe reads are left out.
    changes = ["stage.blocks.loss={hidden=1.0}", "teacher.states=['text']", "loss={hard=1.0}"]
    assert recombine.distillation(path, tmp_path, 7, changes).teacher.states == ()
    assert recombine.distillation(path, tmp_path, 7, ["teacher.top=5"]).teacher.top == 5
    assert recombine.distillation(path, tmp_path, 7, ["teacher.top=5", "loss={hard=1.0}"]).teacher.top == 0
    with pytest.raises(AntgmmError, match="warmup = 9 is not less than the stage's 7 steps"):
        recombine.distillation(path, tmp_path, 7, ["optimizer.warmup=9"])


def test_a_merged_cut_is_saved_once_and_not_replaced(tmp_path):
    directory, keep = tmp_path / "00-recombined", pruning.identity(CONFIG)
    for _ in range(2):
        recombine._save_once(directory, lambda: {"x": np.ones(2)}, {"keep": keep, "config": to_dict(CONFIG)})
    other = {**keep, "vision/layers": np.array([0, 1])}
    with pytest.raises(AntgmmError, match="merges other prunings than these"):
        recombine._save_once(directory, lambda: {"x": np.ones(2)}, {"keep": other})
    (directory / "stage.json").unlink()
    with pytest.raises(AntgmmError, match="is damaged"):
        recombine._save_once(directory, lambda: {"x": np.ones(2)}, {"keep": keep})


def test_a_merged_run_without_its_sources_says_how_to_go_on(tmp_path, stage):
    """As after a preemption on another machine, where `--mirror` brings the run alone."""
    run = tmp_path / "mix"
    stage("mix/stages/00-recombined")
    gone = [Source(tmp_path / "a", ("*",))]
    with pytest.raises(AntgmmError, match=rf"a is not there, .*`antgmm compress {run}/recipe.toml --run {run}`"):
        recombine.recombine(tmp_path / "recipe.toml", run, gone, 3)


@pytest.mark.filterwarnings("default")  # warnings of PyTorch and transformers
@pytest.mark.long
def test_two_cuts_recombine_into_an_exported_model(tmp_path, stage):
    teacher = save_teacher(tmp_path / "teacher")
    config, params = load_hf(teacher)
    key = teacher_key(config, params)
    depth = stage("a", {"vision/layers": [0, 2]}, key=key, config=config)
    width = stage("b", {"vision/mlp": np.tile(np.arange(24), (3, 1))}, key=key, config=config)
    sources = [Source(depth, ("*/layers",)), Source(width, ("*/mlp",))]
    recipe = write_recipe(tmp_path / "recipe.toml", teacher)
    run = recombine.recombine(recipe, tmp_path / "mix", sources, 3, ["report.latency=false"])
    assert status_of(tmp_path / "mix")["state"] == "stopped"
    report = finish(run)
    assert status_of(tmp_path / "mix")["state"] == "complete"
    assert report["export"]["passed"]
    merged, left = (load_student(tmp_path / "mix" / "stages" / name) for name in ("00-recombined", "01-distil"))
    assert sizes(left.config) == {**sizes(config), "vision/layers": 2, "vision/mlp": 24}
    assert left.keep["vision/layers"].tolist() == [0, 2]
    assert left.keep["vision/mlp"].tolist() == [list(range(24))] * 3
    up = merged.load()["vision"]["stack"]["blocks"]["mlp"]["up"]
    np.testing.assert_array_equal(up, np.asarray(params["vision"]["stack"]["blocks"]["mlp"]["up"])[[0, 2], ..., :24])
    assert np.abs(up - left.load()["vision"]["stack"]["blocks"]["mlp"]["up"]).max() > 0
    record = json.loads((tmp_path / "mix" / "stages" / "00-recombined" / "stage.json").read_text())
    assert record["stage"]["sources"] == {"vision/layers": str(depth), "vision/mlp": str(width)}
