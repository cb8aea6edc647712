"""Both objectives, answers and facts of pictures, are trained and resumed by the same loop."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distill
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint
from antgmm_jax.io.books import write_book
from antgmm_jax.pure import functional
from data import maad
from data.facts import facts_loss, with_heads
from data.writers import write_jsonl
from experiments.auto.advice import advice
from experiments.report.write import finish
from experiments.run import stage as stages
from experiments.run.objectives import Answers, Shared, facts_step
from experiments.run.pipeline import Run
from experiments.run.rows.datasets import load_records
from experiments.run.schema.recipe import dump_recipe, load_recipe, load_training
from experiments.run.scores import scoring
from experiments.run.scores.evaluation import evaluate
from experiments.run.targets import target_names
from tests.data.test_facts import CONFIG, FACTS, batch
from tests.experiments import tiny

TRAINING = tiny.TRAINING.replace("antgmm-tiny", "llava-tiny").replace(
    '"bridge/layers" = 2, "encoder/layers" = 1, "decoder/layers" = 1', '"text/layers" = 1'
)
"""The training of a model that compiles in a quarter of the time."""
KINDS = ("facts", "answers", "facts", "answers")
"""Kinds of the phases of a training with more phases than `TRAINING`."""


def step_of(params, optimizer, dtype=jnp.float32):
    return facts_step(facts_loss(CONFIG, params, FACTS, dtype=dtype), optimizer)


@pytest.mark.long
def test_bfloat16_gives_nearly_the_same_loss_and_keeps_float32_parameters():
    params, rows = functional(CONFIG).init(jax.random.key(0)), batch(CONFIG)
    optimizer, losses = distill.make_optimizer(distill.OptimizerConfig(learning_rate=1e-3), steps=3), []
    for dtype in (jnp.float32, jnp.bfloat16):
        state = distill.init_state(with_heads(CONFIG, params, FACTS, 5, jax.random.key(1)), optimizer)
        state, metrics = step_of(params, optimizer, dtype)(state, rows, {}, None)
        losses.append(float(metrics["loss"]))
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.long
def test_facts_training_lowers_the_loss_and_excludes_the_language_model():
    params = functional(CONFIG).init(jax.random.key(0))
    optimizer = distill.make_optimizer(distill.OptimizerConfig(learning_rate=3e-3), steps=30)
    trained = with_heads(CONFIG, params, FACTS, 5, jax.random.key(1))
    assert set(trained["model"]) == {"vision", "bridge"}
    step, rows = step_of(params, optimizer), batch(CONFIG)
    state, losses = distill.init_state(trained, optimizer), []
    for _ in range(30):
        state, metrics = step(state, rows, {}, None)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(TRAINING)
    return load_training(path)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, Run(recipe, folder).finish_stages()


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.long
def test_facts_train_the_image_side_and_answers_all_of_the_model(whole):
    folder, model = whole
    (facts, one), (answers, two) = (checkpoint.load_stage(path) for path in sorted((folder / "stages").iterdir()))
    assert set(facts["params"]) == {"vision", "bridge"} and set(answers["params"]) == {"vision", "bridge", "language"}
    assert_equal(answers["params"], jax.tree.map(np.asarray, model.load()))
    assert (one["objective"], two["objective"]) == ("facts", "answers")
    assert not {"scores"} & (one["metrics"].keys() | two["metrics"].keys())
    fresh = functional(model.config).init(jax.random.key(0))["language"]["tokens"]
    assert not np.array_equal(answers["params"]["language"]["tokens"], fresh)


@pytest.mark.long
def test_the_report_scores_what_the_last_phase_has_trained_once(recipe, whole, tmp_path, monkeypatch):
    run, calls = shutil.copytree(whole[0], tmp_path / "run"), []

    def counted(*arguments, **options):
        calls.append(evaluate(*arguments, **options))
        return calls[-1]

    monkeypatch.setattr(scoring, "evaluate", counted)
    figures = finish(Run(recipe, run))
    assert [scores for scores, _ in calls] == [figures["scores"]]
    assert "Exact match on MAAD-synth, tier s, val, 2 questions" in (run / "export" / "README.md").read_text()


@pytest.mark.long
def test_what_the_report_shows_as_not_learnt_is_named(whole, tmp_path):
    run, path = shutil.copytree(whole[0], tmp_path / "run"), tmp_path / "recipe.toml"
    path.write_text(TRAINING)
    training = load_training(path, ["evaluate.data.samples=60"])
    types = {record.type for record in load_records(training.evaluate.data)}
    (run / "report").mkdir(exist_ok=True)
    for value, notes in ((0.0, 1), (1.0, 0)):
        write_book(run / "report" / "report.json", {"scores": {"by_type": dict.fromkeys(types, value)}})
        assert sum("they are not learnt" in note for note in advice(training, run)) == notes
    write_book(run / "report" / "report.json", {"params": 1})
    assert advice(training, run) == []


def test_only_phases_of_answers_are_scored_and_the_last_one_in_the_report(recipe, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(TRAINING)
    phases = ", ".join(f'{{name="{name}", kind="{kind}", steps=2}}' for name, kind in zip("abcd", KINDS, strict=True))
    training = load_training(path, [f"phase=[{phases}]"])
    assert [work.scored for work in training.work] == [False, True, False, False]
    assert training.answers and recipe.answers
    assert not load_training(path, ['phase=[{name="a", kind="facts", steps=2}]']).answers


@pytest.mark.long
def test_a_training_of_facts_alone_has_a_report_without_scores(antgmm, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "evaluate", None)
    (tmp_path / "recipe.toml").write_text(TRAINING)
    facts = 'phase=[{name="facts", kind="facts", steps=3}]'
    trained = antgmm("train", "recipe.toml", "--run", "run", "--set", facts)
    assert trained.exit_code == 0, trained.output
    assert "parameters" in trained.stdout and "exact match" not in trained.stdout
    assert "report: export" in trained.stderr and "scores" not in trained.stderr
    figures = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert figures["params"] > 0 and "scores" not in figures
    assert "This model has not been scored" in (tmp_path / "run" / "export" / "README.md").read_text()


@pytest.mark.long
@pytest.mark.parametrize("number", [1, 2])
def test_a_stage_of_either_objective_resumes(recipe, whole, tmp_path, monkeypatch, number):
    if number == 2:  # the first one is finished
        shutil.copytree(whole[0], tmp_path / "run", ignore=shutil.ignore_patterns("02-answers", "steps", ".lock"))
    train = stages.train

    def halting(step, state, batches, *, steps, **rest):
        train(step, state, batches, steps=2, **rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train", halting)
        with pytest.raises(KeyboardInterrupt):
            Run(recipe, tmp_path / "run").finish_stages()
    (working,) = (tmp_path / "run" / "steps").iterdir()
    assert checkpoint.latest_step(working) == 2
    assert_equal(Run(recipe, tmp_path / "run").finish_stages().load(), whole[1].load())
    assert not list((tmp_path / "run" / "steps").iterdir())


@pytest.mark.long
def test_latents_of_own_rows_are_facts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 16), ("val", 2)):
        records, path = maad.source("s", split, count), Path(f"{split}.jsonl")
        write_jsonl(records, path)
        lines = [
            {**json.loads(line), "latents": {"price": record.latents["price_0"], "claim": record.latents["claim"]}}
            for line, record in zip(path.read_text().splitlines(), records, strict=True)
        ]
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    Path("recipe.toml").write_text(tiny.TRAINING)  # its bridge has layers, which facts train too
    changes = ['data={kind="jsonl", path="train.jsonl", samples=16}', 'evaluate.data={path="val.jsonl", samples=2}']
    own = load_training("recipe.toml", [*changes, 'phase=[{name="facts", kind="facts", steps=2}]'])
    student = Run(own, "run").finish_stages()
    model, fresh = student.load(), functional(student.config).init(jax.random.key(0))
    moved = {part: max(jax.tree.leaves(jax.tree.map(_distance, model[part], fresh[part]))) for part in model}
    assert moved["language"] == 0 and min(moved["vision"], moved["bridge"]) > 1e-4
    history = checkpoint.load_record("run/stages/01-facts")["metrics"]["history"]
    assert {"accuracy", "worst"} < history[-1].keys() and "cells" not in history[-1]


def _distance(one, other):
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


def test_a_folder_of_a_version_with_other_keys_is_refused_with_a_remedy(recipe, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(dump_recipe(recipe).replace('kind = "facts"', 'kind = "facts"\ntypes = []'))
    with pytest.raises(AntgmmError) as caught:
        Run(recipe, run).finish_stages()
    text = str(caught.value)
    assert "unknown key phase[0].types" in text and "\n" not in text
    assert text.endswith("finish it with that one, or choose another folder")
    assert [path.name for path in run.iterdir()] == ["recipe.toml"]


def test_a_stage_reads_only_the_states_of_the_teacher_that_its_losses_use(tmp_path):
    losses = {
        "image": "hard=0.0, soft=0.0, vision=1.0, bridge=1.0",
        "text": "hidden=1.0",
        "labels": "hard=1.0, soft=0.0",
    }
    stages = (f"{{name='{name}', recover_steps=1, loss={{{loss}}}}}" for name, loss in losses.items())
    (tmp_path / "recipe.toml").write_text(tiny.HEAD.format(teacher="T"))
    changes = [f"stage=[{', '.join(stages)}]", "teacher.states=['vision', 'encoder']", "features=recompute"]
    recipe = load_recipe(tmp_path / "recipe.toml", changes)
    noting = distill.NO_TEACHER._replace(attach=lambda batch, names: {"read": names})
    shared = Shared(recipe, noting, dict, Mock(pack=0), Mock(), lambda stage: None)
    image, text, labels = (Answers(work, shared, Mock()).teacher for work in recipe.work)
    assert image.attach({})["read"] == ("vision/states", "bridge/out")
    assert text.attach({})["read"] == ("final", "encoder/states")
    assert labels.attach({}) == {}
    assert target_names(recipe) == ("final", "vision/states", "encoder/states", "bridge/out")
