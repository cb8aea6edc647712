"""Studies: arms with equal FLOPs, controls with new weights, shared stages, stored results."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from filelock import FileLock

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete
from antgmm_jax.io import checkpoint
from antgmm_jax.io.convert import load_hf, open_hf
from experiments.lab.study.arms import Arm, load_study, recipe_of
from experiments.lab.study.run import lend_stages, results, run_study
from experiments.lab.study.summary import format_scores, markdown, plot, rows
from experiments.run.cuts import new_weights, segment_targets
from experiments.run.progress.flops import step_flops, training_flops
from experiments.run.schema.recipe import dump_recipe, load_recipe
from experiments.run.stage import StageRun
from experiments.run.student import load_student
from tests.experiments.tiny import HEAD, save_llava, save_teacher

ROOT = Path(__file__).resolve().parents[3]
STUDIES = ROOT / "experiments" / "lab" / "studies"

RECIPE = (
    HEAD
    + """
[evaluate.hard]
split = "test_hard"
samples = 8
[[stage]]
name = "layers"
importance = "last"
recover_steps = 2
sizes = {{ "vision/layers" = 2 }}
[[stage]]
name = "mlp"
importance = "magnitude"
mask_steps = 1
recover_steps = 2
sizes = {{ "vision/mlp" = 16 }}
"""
)
STUDY = """
recipe = "{recipe}"
seeds = [0, 1]
length = 20
answer = 5
[[arm]]
name = "full"
[[arm]]
name = "labels"
changes = ["loss.soft=0"]
seeds = [0]
[[arm]]
name = "one_shot"
at_once = true
[[arm]]
name = "scratch"
at_once = true
weights = "random"
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture
def study(teacher, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE.format(teacher=teacher))
    (tmp_path / "study.toml").write_text(STUDY.format(recipe=tmp_path / "recipe.toml"))
    return load_study(tmp_path / "study.toml")


@pytest.fixture
def small(tmp_path):
    """The same study of a model that compiles in a quarter of the time."""
    teacher = save_llava(tmp_path / "teacher")
    text = RECIPE.format(teacher=teacher).replace('"vision/layers" = 2', '"vision/layers" = 1')
    (tmp_path / "recipe.toml").write_text(text)
    (tmp_path / "study.toml").write_text(STUDY.format(recipe=tmp_path / "recipe.toml"))
    return load_study(tmp_path / "study.toml"), teacher


def test_runs_go_seed_by_seed(study):
    names = [(arm.name, seed) for arm, seed in study.runs()]
    assert names == [
        *(("full", 0), ("labels", 0), ("one_shot", 0), ("scratch", 0)),
        *(("full", 1), ("one_shot", 1), ("scratch", 1)),
    ]
    with pytest.raises(AntgmmError, match="no arm 'fool': choose one of full, labels, one_shot, scratch"):
        study.runs(("fool",))


def test_training_flops_by_hand(study, teacher):
    config, _ = load_hf(teacher)
    recipe = load_recipe(study.recipe)

    def step(**smaller):
        cut = pruning.planned_config(config, {axis.replace("_", "/"): n for axis, n in smaller.items()})
        return 3 * sum(pruning.forward_flops(cut, 8, 20, 5).values())

    layers, both = step(vision_layers=2), step(vision_layers=2, vision_mlp=16)
    # Two steps after the first cut, one while the second stage's gates close, two after the second cut.
    assert training_flops(config, recipe, length=20, answer=5) == 2 * layers + 1 * layers + 2 * both


def test_training_flops_of_stages_by_tower_by_hand(study, teacher):
    config, _ = load_hf(teacher)
    image = ["loss.hard=0", "loss.soft=0", "loss.vision=1", "teacher.states=['bridge']"]
    recipe = load_recipe(study.recipe, [*(f"stage.layers.{key}" for key in image[:3]), image[3]])
    frozen = recipe.stages[1].model_copy(update={"sizes": {"decoder/mlp": 16}, "frozen": ("vision", "bridge")})
    recipe = recipe.model_copy(update={"stages": (recipe.stages[0], frozen)})
    at = pruning.planned_config(config, {"vision/layers": 2})
    closing = pruning.forward_flops(at, 8, 20, 5)
    cut = pruning.forward_flops(pruning.planned_config(at, {"decoder/mlp": 16}), 8, 20, 5)
    image_side = 2 * (closing["vision"] + closing["bridge"])
    language = sum(closing[tower] + 2 * cut[tower] for tower in ("encoder", "decoder", "tokens"))
    features = recipe.data.samples * (closing["vision"] + closing["bridge"]) // 8
    trained = 3 * (image_side + language)
    assert training_flops(config, recipe, length=20, answer=5) == trained + features
    # Features of four shifted views per picture; a further stage with the same frozen parts reuses them.
    moved = frozen.model_copy(update={"shift": 1})
    again = moved.model_copy(update={"sizes": {}, "mask_steps": 0})
    recipe = recipe.model_copy(update={"stages": (recipe.stages[0], moved, again)})
    further = 6 * sum(cut[tower] for tower in ("encoder", "decoder", "tokens"))
    assert training_flops(config, recipe, length=20, answer=5) == trained + 4 * features + further


def test_an_arm_that_cuts_at_once_has_equal_flops_and_sizes(study, teacher):
    config, _ = load_hf(teacher)
    staged = load_recipe(study.recipe)
    whole = training_flops(config, staged, length=20, answer=5)
    (shot, scratch) = (arm for arm in study.arms if arm.at_once)
    # Components have no units to close one by one.
    turned = 'stage.layers.sizes={"vision/layers"=2, "vision/embed"=16}'
    how = 'stage.layers.importance={{"*/embed"="principal", "*/layers"="last", "*"="{}"}}'
    components, unfit = (shot.model_copy(update={"changes": (turned, how.format(m))}) for m in ("magnitude", "last"))
    assert recipe_of(study, components, 7, config).stages[0].mask_steps == 0
    with pytest.raises(
        AntgmmError, match="arm 'one_shot' cannot prune all at once: .*'last' cannot score vision/heads$"
    ):
        recipe_of(study, unfit, 7, config)
    # The reference is the FLOPs of the study's recipe, without the changes of the arm.
    halved = shot.model_copy(update={"changes": ("stage.mlp.optimizer.batch_size=4", "stage.mlp.repeat.price=2")})
    for arm, mask in ((shot, 1), (scratch, 0), (halved, 1)):
        recipe = recipe_of(study, arm, 7, config)
        (stage,) = recipe.stages
        assert (recipe.seed, stage.mask_steps) == (7, mask)
        assert (stage.optimizer.batch_size, stage.repeat) == ((4, {"price": 2}) if arm is halved else (8, {}))
        assert {axis: stage.sizes[axis] for axis in ("vision/layers", "vision/mlp")} == {
            "vision/layers": 2,
            "vision/mlp": 16,
        }
        assert (stage.method("vision/layers"), stage.method("vision/mlp")) == ("last", "magnitude")
        small = pruning.planned_config(config, {"vision/layers": 2, "vision/mlp": 16})
        spent = training_flops(config, recipe, length=20, answer=5)
        # Steps are whole, so the difference is at most half a step.
        assert abs(spent - whole) <= step_flops(small, stage, length=20, answer=5) / 2


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_arm_of_a_packaged_study_is_valid_and_ends_in_its_shape(file, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    study = load_study(file)
    teacher, _ = open_hf(load_recipe(study.recipe).teacher.path)
    shapes = []
    for arm in study.arms:
        config = teacher
        recipe = recipe_of(study, arm, 0, teacher, pretrained="somewhere" if arm.pretrained else "")
        (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
        assert load_recipe(tmp_path / "recipe.toml") == recipe  # as stored in a run's folder
        for stage in recipe.stages:
            for targets in segment_targets(config, stage):
                for axis in complete(config, targets):
                    stage.method(axis)  # raises for an axis without a score
                config = pruning.planned_config(config, targets)
        shapes.append(config)
    # All arms end in one shape, except in studies of the sizes themselves.
    assert len(set(shapes)) == (len(study.arms) if study.curve or file.stem == "towers" else 1)


def test_an_arm_runs_the_stages_in_its_own_order(study, teacher):
    config, _ = load_hf(teacher)
    arm = Arm(name="back", order=("mlp", "layers"))
    assert [stage.name for stage in recipe_of(study, arm, 0, config).stages] == ["mlp", "layers"]
    with pytest.raises(AntgmmError, match="arm 'part': order must name each stage once: layers, mlp"):
        recipe_of(study, Arm(name="part", order=("mlp", "mlp")), 0, config)


@pytest.mark.long
def test_a_study_runs_every_arm_once(small, tmp_path, monkeypatch):
    study, teacher = small
    folder, out = tmp_path / "runs", tmp_path / "results" / "study.json"
    first = run_study(study, folder, out, only=("full", "labels", "scratch"))
    assert [(r["arm"], r["seed"]) for r in first] == [
        ("full", 0),
        ("full", 1),
        ("labels", 0),
        ("scratch", 0),
        ("scratch", 1),
    ]
    assert json.loads(out.read_text()) == first
    _, params = load_hf(teacher)
    for result in first:
        place = folder / result["arm"] / f"seed-{result['seed']}"
        student = load_student(max((place / "stages").iterdir()))
        assert sizes(student.config)["vision/mlp"] == 16
        assert result["params"] == sum(leaf.size for leaf in jax.tree.leaves(student.load()))
        assert set(result["by_type"]) and 0 <= result["exact_match_hard"] <= 1
    # The token table is not cut: it stays near the teacher's table only if training starts from the teacher.
    table = np.asarray(params["language"]["tokens"])
    near = {
        arm: np.abs(
            np.asarray(load_student(max((folder / arm / "seed-0/stages").iterdir())).load()["language"]["tokens"])
            - table
        ).max()
        for arm in ("full", "scratch")
    }
    assert near["full"] < 0.05 < 0.5 < near["scratch"]
    # All runs that compare with the teacher share one cache.
    assert len(list(folder.glob("cache/*/meta.json"))) == 1
    assert not list(folder.glob("*/*/cache"))

    # Finished runs are not repeated, and runs held by another process are skipped.
    monkeypatch.setattr("experiments.lab.study.run._run", lambda *a: pytest.fail("ran again"))
    assert run_study(study, folder, out, only=("full", "labels", "scratch")) == first
    monkeypatch.undo()
    held = folder / "one_shot" / "seed-0"
    held.mkdir(parents=True)
    with FileLock(held / ".lock"):
        later = run_study(study, folder, out, only=("one_shot",))
    assert [(r["arm"], r["seed"]) for r in later if r["arm"] == "one_shot"] == [("one_shot", 1)]


@pytest.mark.long
def test_shared_stages_run_once(small, tmp_path, monkeypatch):
    study, _ = small
    folder, out = tmp_path / "runs", tmp_path / "study.json"
    late = Arm(name="late", changes=("stage.mlp.recover_steps=3",))
    study = study.model_copy(update={"seeds": (0,), "arms": (study.arms[0], late)})
    run_study(study, folder, out, only=("full",))
    began = []
    whole = StageRun.run
    monkeypatch.setattr(StageRun, "run", lambda self, start: began.append(self.stage.name) or whole(self, start))
    (_, lent) = run_study(study, folder, out)
    assert began == ["mlp"]

    # The figures equal those of a separate run.
    monkeypatch.setattr("experiments.lab.study.run.lend_stages", lambda *a: None)
    (alone,) = run_study(study.model_copy(update={"arms": (late,)}), tmp_path / "alone", tmp_path / "alone.json")
    assert began == ["mlp", "layers", "mlp"]
    assert {**lent, "seconds": 0} == {**alone, "seconds": 0}
    one, other = (
        load_student(max((place / "late/seed-0/stages").iterdir())).load() for place in (folder, tmp_path / "alone")
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)

    # A run that has begun is left unchanged.
    monkeypatch.undo()
    began_elsewhere = folder / "full" / "seed-7"
    began_elsewhere.mkdir()
    lend_stages(load_recipe(study.recipe), folder, began_elsewhere)
    assert not list(began_elsewhere.iterdir())


@pytest.mark.long
def test_runs_in_the_results_file_are_not_repeated(small, tmp_path, monkeypatch):
    study, _ = small
    folder, out = tmp_path / "runs", tmp_path / "study.json"
    short = study.model_copy(update={"seeds": (0,), "arms": study.arms[:1]})
    first = run_study(short, folder, out)
    monkeypatch.setattr("experiments.lab.study.run._run", lambda study, arm, seed, *a: {**first[0], "seed": seed})

    # On another machine the folder is empty: only new runs start, and no result is lost.
    later = run_study(short.model_copy(update={"seeds": (0, 1)}), tmp_path / "elsewhere", out)
    assert [result["seed"] for result in later] == [0, 1] and later[0] == first[0]
    assert not (tmp_path / "elsewhere/full/seed-0").exists()

    # Results of another recipe or teacher are ignored.
    other = short.model_copy(update={"changes": ("optimizer.learning_rate=0.5",)})
    assert run_study(other, tmp_path / "other", out)[0]["of"] != first[0]["of"]
    assert (tmp_path / "other/full/seed-0").exists()
    assert results({("full", 0): "another"}, folder, tmp_path / "none.json") == []


@pytest.mark.long
def test_weights_of_a_finished_phase_replace_new_ones(teacher, tmp_path):
    config, params = load_hf(teacher)
    phase = tmp_path / "stages" / "01-facts"
    checkpoint.save_stage(phase, {"params": {"vision": params["vision"]}}, {})
    made, fresh = new_weights(config, str(phase), 5), new_weights(config, "random", 5)
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), made["vision"], params["vision"])
    assert all(jax.tree.leaves(same))
    np.testing.assert_array_equal(made["language"]["tokens"], fresh["language"]["tokens"])
    smaller = pruning.planned_config(config, {"vision/layers": 2})
    with pytest.raises(AntgmmError, match="was trained with another shape"):
        new_weights(smaller, str(phase), 5)


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ('weights = "random"', r"arm\[0\]: arm 'x' starts from other weights, which needs at_once = true"),
        ('name2 = "x"', r"unknown key arm\[0\].name2, did you mean 'name'\?"),
        ("at_once = 1", r"arm\[0\].at_once = 1: "),
    ],
)
def test_a_wrong_study_is_refused(tmp_path, wrong, fault):
    path = tmp_path / "study.toml"
    path.write_text(f'recipe = "r.toml"\nseeds = [0]\nlength = 1\nanswer = 1\n[[arm]]\nname = "x"\n{wrong}\n')
    with pytest.raises(AntgmmError, match=f"study.toml: {fault}[^;]*$"):
        load_study(path)


def test_scores_and_spreads_by_hand(tmp_path):
    runs = [
        {"arm": "a", "seed": 0, "params": 1500, "flops": 2e12, "exact_match": 0.5, "exact_match_hard": 0.25},
        {"arm": "a", "seed": 1, "params": 1500, "flops": 2e12, "exact_match": 0.7, "exact_match_hard": 0.25},
        {"arm": "b", "seed": 0, "params": 1500, "flops": 2e12, "exact_match": 0.1},
    ]
    assert format_scores([0.5, 0.7]) == "0.600 (0.500 to 0.700)"
    assert rows(runs)[1] == ("b", "1", "2 k", "2.0 T", "0.100", "-")
    assert markdown(runs).splitlines()[2].startswith("| a | 2 | 2 k | 2.0 T | 0.600 (0.500 to 0.700) | 0.250 (")
    plot(runs, tmp_path / "plot.svg")
    first = (tmp_path / "plot.svg").read_bytes()
    plot(runs, tmp_path / "plot.svg")
    assert first.count(b"<svg") == 1 and first == (tmp_path / "plot.svg").read_bytes()
