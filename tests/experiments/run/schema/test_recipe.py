"""Recipes: defaults from their own tables, overrides, and errors in one line that names the key."""

import dataclasses
from pathlib import Path

import pytest
from pydantic import ValidationError

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete
from antgmm_jax.presets import PRESETS
from distill import LossConfig, StepConfig
from experiments.run.schema import FileData
from experiments.run.schema.recipe import difference, dump_recipe, fingerprint, load_recipe, load_training

RECIPES = Path(__file__).resolve().parents[4] / "experiments" / "recipes"

RECIPE = """
[teacher]
path = "teacher"
[data]
kind = "maad"
tier = "s"
samples = 100
[loss]
soft = 1.0
temperature = 2.0
[optimizer]
learning_rate = 1e-3
batch_size = 8
warmup = 2
[evaluate.data]
split = "val"
samples = 50
[[stage]]
name = "blocks"
recover_steps = 10
[stage.sizes]
"vision/layers" = 2
"encoder/mlp" = 0.5
[stage.importance]
"*/layers" = "block_influence"
"*" = "taylor"
[[stage]]
name = "hidden"
segments = 3
mask_steps = 4
recover_steps = 6
sizes = { "text/embed" = 1.0 }
[stage.loss]
hard = 0.25
[stage.optimizer]
learning_rate = 5e-4
"""

TRAINING = """
[model]
preset = "antgmm-tiny"
[data]
kind = "maad"
tier = "s"
samples = 100
[optimizer]
learning_rate = 1e-3
batch_size = 8
[evaluate.data]
split = "val"
[[phase]]
name = "vision"
kind = "facts"
steps = 5
[[phase]]
name = "answers"
kind = "answers"
steps = 7
frozen = ["vision", "bridge"]
optimizer = { batch_size = 4 }
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="recipe.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_stages_inherit_the_tables_of_their_recipe(write):
    recipe = load_recipe(write(RECIPE))
    blocks, hidden = recipe.stages
    assert blocks.loss == recipe.loss
    assert blocks.optimizer == recipe.optimizer
    assert (hidden.loss.hard, hidden.loss.soft, hidden.loss.temperature) == (0.25, 1.0, 2.0)
    assert (hidden.optimizer.learning_rate, hidden.optimizer.batch_size) == (5e-4, 8)
    assert (blocks.steps, hidden.steps) == (10, 30)
    assert recipe.evaluate.data.model_dump() == {"kind": "maad", "tier": "s", "split": "val", "samples": 50}


def test_a_whole_number_is_a_count_and_a_decimal_a_fraction(write):
    blocks, hidden = load_recipe(write(RECIPE)).stages
    assert [(size, type(size)) for size in blocks.sizes.values()] == [(2, int), (0.5, float)]
    assert type(hidden.sizes["text/embed"]) is float


def test_the_first_pattern_decides_how_an_axis_is_scored(write):
    blocks, hidden = load_recipe(write(RECIPE)).stages
    assert blocks.method("encoder/layers") == "block_influence"
    assert blocks.method("decoder/mlp") == "taylor"
    assert hidden.method("vision/embed") == "activation"
    assert hidden.method("vision/layers") == "block_influence"
    only = load_recipe(write(RECIPE), ['stage.hidden.importance={"text/*"="magnitude"}']).stages[1]
    with pytest.raises(AntgmmError, match="prunes bridge/embed, but no pattern"):
        only.method("bridge/embed")


def test_overrides_apply_at_every_depth(write):
    path = write(RECIPE)
    recipe = load_recipe(
        path, ["seed=4", "optimizer.batch_size=2", "stage.hidden.recover_steps=1", "stage.0.importance=random"]
    )
    assert (recipe.seed, recipe.stages[0].optimizer.batch_size, recipe.stages[1].recover_steps) == (4, 2, 1)
    assert recipe.stages[0].importance == {"*": "random"}
    assert load_recipe(path, ["teacher.path=a/b"]).teacher.path == "a/b"


def test_equal_recipes_have_equal_fingerprints(write):
    recipe = load_recipe(write(RECIPE))
    again = load_recipe(write(dump_recipe(recipe), "again.toml"))
    assert again == recipe
    assert fingerprint(again) == fingerprint(recipe)
    assert difference(again, recipe) == ""
    other = load_recipe(write(RECIPE), ["stage.hidden.loss.hard=0.5"])
    assert fingerprint(other) != fingerprint(recipe)
    assert difference(recipe, other) == "stage.1.loss.hard: 0.25 / 0.5"


def test_what_a_report_measures_makes_no_other_recipe(write):
    recipe, other = load_recipe(write(RECIPE)), load_recipe(write(RECIPE), ["report.latency=false"])
    assert fingerprint(other) == fingerprint(recipe)
    assert difference(recipe, other) == ""
    training = load_training(write(TRAINING))
    assert difference(training, training) == ""


def test_a_recipe_cannot_be_changed(write):
    recipe = load_recipe(write(RECIPE))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.stages[0].name = "other"
    with pytest.raises(dataclasses.FrozenInstanceError, match="hard"):
        recipe.stages[0].loss.hard = 3.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.0.szies=3", "unknown key stage[0].szies, did you mean 'sizes'?"),
        ("loss.hrad=1.0", "unknown key loss.hrad, did you mean 'hard'?"),
        ("data.teir=1", "unknown key data.teir, did you mean 'tier'?"),
        ("stage.1.optimizer.lr=1.0", "unknown key stage[1].optimizer.lr: known here are kind, learning_rate, "),
        ("data.kind=csv", "data: Input tag 'csv' found using 'kind' does not match any of the expected tags: 'maad', "),
        ("teacher.mode=onlin", "teacher.mode = \"onlin\": Input should be 'cache' or 'online'"),
        ("seed=true", "seed = true: Input should be a valid integer"),
        ("loss.soft=nan", "loss.soft = NaN: Input should be a finite number"),
        ("loss={soft=0.0, hard=0.0}", "loss: every weight is 0: set at least one"),
        ("optimizer={batch_size=8}", "optimizer.learning_rate is missing"),
        ("optimizer.kind=sgd", "optimizer.kind = \"sgd\": Input should be 'adamw' or 'muon'"),
        ("optimizer.accumulate=3", "optimizer: accumulate = 3 does not divide batch_size = 8"),
        ("optimizer.warmup=10", "stage[0]: warmup = 10 is not less than the stage's 10 steps"),
        (
            'stage.0.sizes={"vision/layers"=0}',
            'stage[0].sizes."vision/layers" = 0: must be the number of units to keep',
        ),
        ('stage.0.sizes={"vision/layers"=1.5}', 'stage[0].sizes."vision/layers" = 1.5: must be the number'),
        ('stage.0.sizes={"vision"=2}', 'stage[0].sizes.vision = "vision": must be an axis tower/dimension'),
        ("stage.0.importance=block_influence", "stage[0]: importance 'block_influence' cannot score encoder/mlp"),
        ("stage.0.importance=last", "stage[0]: importance 'last' cannot score encoder/mlp"),
        ("stage.0.importance=principal", "stage[0]: importance 'principal' cannot score vision/layers"),
        ("stage.1.importance=principal", 'stage[1]: importance "principal" cannot close units gradually'),
        ("stage.0.importance=activation", "stage[0]: importance 'activation' cannot score vision/layers"),
        ('stage.0.importance={"*/mlp"="taylor"}', "stage[0]: no pattern of importance matches vision/layers"),
        ('stage.1.importance={"*"="taylor", "*/mlp"="last"}', "stage[1]: importance pattern '*/mlp' matches none"),
        ("stage.1.name=blocks", "two stages are named 'blocks'"),
        ("stage=[]", "there is no [[stage]]: add at least one"),
        ("loss.hidden=1.0", "stage 'blocks' compares block states: list the towers in teacher.states"),
        ('teacher.states=["encoder"]', "no stage uses teacher.states"),
        ("evaluate.data.split=train", "evaluate.data are the records of data; use another split or path"),
        ("evaluate.hard={samples=9}", "evaluate.hard are the records of data; use another split or path"),
        ('evaluate.hard={splti="test_hard"}', "unknown key evaluate.hard.splti, did you mean 'split'?"),
        ("evaluate.hard=3", "evaluate.hard = 3: Input should be"),
        ("buckets=[16, 8]", "buckets = [16, 8]: widths must be unique and ascending"),
        ("buckets=[0]", "buckets[0] = 0: Input should be greater than or equal to 1"),
        ("max_length=0", "max_length = 0: Input should be greater than or equal to 1"),
        ("stage.9.name=x", "there is no '9', only blocks, hidden"),
        ("seed", "override 'seed' is not of the form key=value"),
        ("loss.soft=1.0 2", 'loss.soft = "1.0 2": Input should be a valid number'),
    ],
)
def test_an_invalid_recipe_is_refused_in_one_line_that_names_the_key(write, override, message):
    with pytest.raises(AntgmmError) as caught:
        load_recipe(write(RECIPE), [override])
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert len(text) < 320


def test_cuts_to_components_need_one_segment_without_masks(write):
    at_once = ["stage.1.importance=principal", "stage.1.segments=1", "stage.1.mask_steps=0"]
    assert load_recipe(write(RECIPE), at_once).stages[1].method("text/embed") == "principal"
    idle = ['stage.1.importance={"text/embed"="taylor", "*"="principal"}']  # matches no axis of this stage
    assert load_recipe(write(RECIPE), idle).stages[1].keeps_moments


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.mode=online"], "teacher.top = 3 is for a cache: set teacher.mode to cache"),
        (["loss.soft=0", "loss.hard=1"], "teacher.top = 3 has no effect: set the weight of loss.soft or loss.rank"),
        (["stage.hidden.loss.rank=1"], "teacher.top = 3: loss.rank reads the teacher's four most probable tokens"),
        (["stage.hidden.loss.temperature=1.5"], "teacher.top = 3 needs one loss.temperature, not 1.5, 2"),
    ],
)
def test_top_tokens_of_a_teacher_need_a_cache_and_fitting_losses(write, overrides, message):
    assert load_recipe(write(RECIPE), ["teacher.top=3"]).teacher.top == 3
    with pytest.raises(AntgmmError, match=message):
        load_recipe(write(RECIPE), ["teacher.top=3", *overrides])


def test_every_error_is_listed_once(write):
    with pytest.raises(AntgmmError) as caught:
        load_recipe(write(RECIPE), ["loss.hrad=1.0", "seed=1.5", "stage.1.szies=1"])
    text = str(caught.value)
    assert [text.count(word) for word in ("hrad", "seed", "szies")] == [1, 1, 1]


def test_invalid_files_are_refused(write, tmp_path):
    with pytest.raises(AntgmmError, match=r"cannot read the recipe .*none.toml: No such file"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(AntgmmError, match=r"broken.toml is not TOML: .*line 1"):
        load_recipe(write("a = \nb = 1", "broken.toml"))
    with pytest.raises(AntgmmError, match="teacher is missing; loss is missing"):
        load_recipe(write("seed = 1", "short.toml"))
    with pytest.raises(AntgmmError, match="it is a recipe for `antgmm train`"):
        load_recipe(write(TRAINING))
    with pytest.raises(AntgmmError, match="it is a recipe for `antgmm compress`"):
        load_training(write(RECIPE))


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 3000 + "]" * 3000, "a = " + "{a = " * 3000 + "1" + "}" * 3000, ".".join("a" * 5000) + " = 1"],
)
def test_keys_of_great_depth_are_one_line(write, text):
    with pytest.raises(AntgmmError, match="is not TOML|nested too deeply"):
        load_recipe(write(text))


@pytest.mark.parametrize("value", ["[" * 3000 + "]" * 3000, "1" * 5000, "99999999999999999999"])
def test_a_value_of_any_size_is_one_line(write, value):
    with pytest.raises(AntgmmError, match=r"override .* is not TOML|batch_size = 9+: Input should be less"):
        load_recipe(write(RECIPE), [f"optimizer.batch_size={value}"])


def test_a_users_own_files(write):
    data = '[data]\nkind = "jsonl"\npath = "ads/train.jsonl"\nsamples = 100\n'
    text = RECIPE.replace('[data]\nkind = "maad"\ntier = "s"\nsamples = 100\n', data)
    assert text != RECIPE
    with pytest.raises(AntgmmError, match=r"evaluate\.data\.split = \"val\": Input should be '', 'train' or 'test'"):
        load_recipe(write(text))
    held_out = text.replace('split = "val"', 'split = "test"')
    for same in ("ads/train.jsonl", "./ads/train.jsonl", "ads/../ads/train.jsonl"):
        with pytest.raises(AntgmmError, match="are the records of data"):
            load_recipe(write(held_out), [f"evaluate.data.path={same}"])
    assert load_recipe(write(held_out), ["data.split=train"]).evaluate.data.split == "test"
    recipe = load_recipe(write(text.replace('split = "val"', 'path = "ads/val.jsonl"')))
    assert isinstance(recipe.evaluate.data, FileData)
    assert recipe.evaluate.data.path == "ads/val.jsonl"
    elsewhere = write(text.replace('split = "val"', 'kind = "tfds"\npath = "ads"\nsplit = "val"'))
    assert load_recipe(elsewhere).evaluate.data.kind == "tfds"


def test_hard_records_inherit_the_data_table(write):
    plain = load_recipe(write(RECIPE))
    assert plain.evaluate.hard is None
    hard = load_recipe(write(RECIPE), ['evaluate.hard={split="test_hard"}'])
    assert hard.evaluate.hard.model_dump() == {**hard.data.model_dump(), "split": "test_hard"}
    assert load_recipe(write(dump_recipe(hard), "again.toml")) == hard
    assert difference(plain, hard) == "evaluate.hard.kind: absent / maad"
    assert fingerprint(plain) != fingerprint(hard)
    with pytest.raises(AntgmmError) as caught:
        load_recipe(write(RECIPE), ["data.tier=xl", 'evaluate.hard={split="test_hard"}'])
    assert str(caught.value).count("xl") == 1
    with pytest.raises(AntgmmError, match="unknown key evaluate.hard"):
        load_training(write(TRAINING), ['evaluate.hard={split="test_hard"}'])


def test_a_training_recipe(write):
    training = load_training(write(TRAINING))
    vision, answers = training.phases
    assert (vision.optimizer.batch_size, answers.optimizer.batch_size) == (8, 4)
    assert answers.frozen == ("vision", "bridge")
    assert (training.buckets, training.max_length, training.max_answer, training.model.sizes) == ((), 512, 64, {})
    control = load_training(write(TRAINING), ["buckets=[8, 16]", 'model.sizes={"text/embed"=96}', "max_answer=9"])
    assert (control.buckets, control.max_answer, control.model.sizes) == ((8, 16), 9, {"text/embed": 96})
    assert load_training(write(dump_recipe(control), "again.toml")) == control
    with pytest.raises(AntgmmError, match=r'model.sizes."text/embed" = 0.5: Input should be a valid integer'):
        load_training(write(TRAINING), ['model.sizes={"text/embed"=0.5}'])
    assert training.evaluate.data.samples == 100
    with pytest.raises(AntgmmError, match=r"phase\[0\]: a facts phase trains exactly the image side"):
        load_training(write(TRAINING), ['phase.vision.frozen=["vision"]'])
    with pytest.raises(AntgmmError, match=r"set either preset \(random parameters\) or path"):
        load_training(write(TRAINING), ['model.path="mine"'])
    with pytest.raises(AntgmmError, match="use antgmm compress"):
        load_training(write(TRAINING), ['model={path="mine", sizes={"text/embed"=96}}'])


def test_buckets_and_packing_exclude_each_other(write):
    assert load_recipe(write(RECIPE)).pack == 0
    assert load_training(write(TRAINING), ["pack=512"]).pack == 512
    with pytest.raises(AntgmmError, match="pack puts several samples into a row: set only one"):
        load_recipe(write(RECIPE), ["pack=512", "buckets=[8]"])


def test_weights_of_the_bridge_tokens_need_a_bridge_loss(write):
    keys = ['loss.bridge_tokens="sensitivity"', "loss.bridge=0.5"]
    assert load_recipe(write(RECIPE), keys).stages[0].loss.bridge_tokens == "sensitivity"
    with pytest.raises(AntgmmError, match="bridge_tokens = 'sensitivity' has no effect: set the weight of bridge"):
        load_recipe(write(RECIPE), keys[:1])


def test_a_recipe_embeds_the_settings_of_the_packages_that_use_them(write):
    blocks, hidden = load_recipe(write(RECIPE)).stages
    assert blocks.loss == LossConfig(soft=1.0, temperature=2.0)
    assert hidden.optimizer == StepConfig(learning_rate=5e-4, batch_size=8, warmup=2)


def test_packaged_recipes_are_valid():
    texts = {path: path.read_text() for path in sorted(RECIPES.glob("*.toml"))}
    cuts = [load_recipe(path) for path, text in texts.items() if "[[stage]]" in text]
    trainings = [load_training(path) for path, text in texts.items() if "[[phase]]" in text]
    assert len(cuts) + len(trainings) == len(texts) >= 2
    assert all(training.model.path or training.model.preset in PRESETS for training in trainings)


def test_the_demo_scores_every_axis_that_it_cuts():
    for stage in load_recipe(RECIPES / "demo.toml").stages:
        counts = {axis: size for axis, size in stage.sizes.items() if isinstance(size, int)}
        for axis in complete(PRESETS["antgmm-deep"], counts):
            stage.method(axis)
