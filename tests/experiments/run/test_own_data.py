"""A user's own rows, from JSONL and pictures to an exported student."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

import data.maad as maad
from antgmm_jax.families import inputs
from antgmm_jax.families.common.words import user_turn
from antgmm_jax.io import checkpoint
from antgmm_jax.io.books import read_book
from antgmm_jax.io.convert import load_hf, open_hf
from antgmm_jax.io.loading import load_processor
from data.chat import messages
from data.readers import read_records
from data.record import prompt
from data.writers import write_chat, write_jsonl
from experiments.report.write import finish
from experiments.run import stage
from experiments.run.pipeline import Run
from experiments.run.rows.datasets import encode_both, load_both
from experiments.run.schema.recipe import load_recipe, load_training
from experiments.run.student import teacher_key
from tests import reference
from tests.experiments.own_data import (
    CHATLESS,
    DEEPSTACK,
    ENCODERS,
    FROZEN,
    RECIPES,
    SMALL,
    TEMPLATE,
    antgmm,
    as_conversations,
    cut,
    recipe_of,
    save_untrained,
    tiny,
)
from tests.experiments.tiny import save_llava, save_qwen3_vl, save_smolvlm

# Commands may cause warnings of PyTorch and transformers.
pytestmark = pytest.mark.filterwarnings("default")
CONVERSING = ("llava-tiny", "smolvlm-tiny", "qwen3-vl-tiny", "gemma3-tiny", *CHATLESS)
RESUMED = ("llava-tiny", "gemma3-tiny", "antgmm-tiny")
"""Models whose runs are stopped once: resuming does not depend on the family, and a run of each takes a minute."""
WHOLE = ("antgmm-tiny", "llava-tiny", "blip2-opt-tiny")
"""Models of three kinds whose teacher is trained and whose latency is measured too: an encoder-decoder, a decoder, one
without a chat."""


@pytest.mark.long
@pytest.mark.parametrize("preset", SMALL)
def test_a_users_rows_become_an_exported_student(ads, preset):
    if preset == "llava-tiny":
        for split in ("train", "test"):
            as_conversations(ads / "ads" / f"{split}.jsonl")
    teacher = ["teacher.path=runs/teacher/export"]
    if preset in WHOLE:
        taught = [*tiny(preset), "buckets=[]", f'prompt="{TEMPLATE}"']
        trained = antgmm("train", recipe_of(preset), "runs/teacher", *taught)
        assert trained.exit_code == 0, trained.output
    else:
        save_untrained(preset, ads / "runs/teacher/export")
        (ads / "runs/teacher/export/antgmm.json").write_text(json.dumps({"prompt": TEMPLATE}))
    changes = teacher + [change for change in tiny(preset) if not change.startswith(("model", "phase"))]
    # Compilation takes most of the time: few steps, no mask phase, and scores without gradients.
    stage = ["stage.cut.importance=magnitude", "stage.cut.mask_steps=0", "stage.cut.recover_steps=2"]
    stage += [] if preset in WHOLE else ["report.latency=false"]
    recipe, sizes = recipe_of(preset, "-compress"), cut(preset)
    compressed = antgmm("compress", recipe, "runs/student", *changes, *stage, sizes)
    assert compressed.exit_code == 0, compressed.output
    gate = json.loads((ads / "runs/student/report/gate.json").read_text())
    assert gate["passed"] and gate["answers_equal"] == 1.0 and gate["prompts"] == 8
    # The student inherits the teacher's prompt template, and the export records it.
    assert json.loads((ads / "runs/student/export/antgmm.json").read_text()) == {"prompt": TEMPLATE}
    config, processor = open_hf(ads / "runs/student/export")[0], load_processor(ads / "runs/student/export")
    recipe = load_recipe(recipe, [*changes, *stage, sizes])
    records, reads = load_both(recipe), inputs(config, processor)
    (batch,) = encode_both(recipe, records, processor, config)[1].in_order(8, prompts=True)
    for row, record in enumerate(records[1]):
        # Rows of conversations hold the words already.
        words = record.question if record.turns else prompt(record.question, record.text, TEMPLATE)
        line = reads.chat(user_turn(words, 1))
        expected = processor(images=record.images[0], text=line, return_tensors="np")["input_ids"][0]
        mask = batch["prompt/attention_mask"][row] == 1
        np.testing.assert_array_equal(batch["prompt/input_ids"][row][mask], expected)
    _runs_in_transformers(ads / "runs/student/export", ads / "ads", preset)


@pytest.mark.long
@pytest.mark.parametrize(("preset", "save"), [("smolvlm-tiny", save_smolvlm), ("qwen3-vl-tiny", save_qwen3_vl)])
def test_models_with_tiles_are_compressed_on_rows_with_any_number_of_pictures(ads, preset, save):
    teacher, rng = save(ads / "teacher"), np.random.default_rng(0)
    for split, rows in (("train", 16), ("test", 8)):
        lines = []
        for row in range(rows):
            names = [f"{split}-{row}-{k}.png" for k in range(row % 3)]
            for k, name in enumerate(names):
                size = (40 + 30 * (row % 2), 64 if k else 33)
                Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(ads / "ads" / name)
            lines.append(
                json.dumps({"images": names, "question": f"is it {row}?", "answer": "yes" if row % 2 else "no"})
            )
        (ads / "ads" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    recipe = recipe_of(preset, "-compress")
    changes = [change for change in tiny(preset) if not change.startswith(("model", "phase", "data.samples"))]
    changes += [f"teacher.path={json.dumps(str(teacher))}", "data.samples=16", "stage.cut.importance=activation"]
    changes += ["stage.cut.mask_steps=1", "stage.cut.recover_steps=2", "report.latency=false"]
    changes += ['stage.cut.sizes={"vision/mlp"=0.5, "text/mlp"=0.5, "text/embed"=0.5}']
    done = antgmm("compress", recipe, "runs/tiles", *changes)
    assert done.exit_code == 0, done.output
    gate = json.loads((ads / "runs/tiles/report/gate.json").read_text())
    assert gate["passed"] and gate["answers_equal"] == 1.0 and gate["prompts"] == 8


def _runs_in_transformers(directory, rows, preset):
    """Loads and runs the exported folder with `transformers` alone."""
    model, processor = reference.reloaded(directory), AutoProcessor.from_pretrained(directory)
    layers, text = 2 if preset in DEEPSTACK else 1, model.config.text_config
    assert model.config.vision_config.num_hidden_layers == layers
    assert (text.num_layers, text.d_model) == (1, 32) if preset in ENCODERS else text.num_hidden_layers == layers
    special = processor.tokenizer
    assert (text.pad_token_id, text.eos_token_id) == (special.pad_token_id, special.eos_token_id)
    record = read_records("jsonl", rows / "test.jsonl")[0]
    line = inputs(open_hf(directory)[0], processor).chat(user_turn(prompt(record.question, record.text), 1))
    given = processor(images=record.images[0], text=line, return_tensors="pt")
    assert model.generate(**given, max_new_tokens=3).shape[0] == 1


@pytest.mark.long
@pytest.mark.parametrize("preset", RESUMED)
def test_200_conversations_are_compressed_by_a_run_that_resumes_once(tmp_path, monkeypatch, preset):
    changes = conversations(tmp_path, monkeypatch, preset)
    changes += ["checkpoint_every=1", "stage.cut.mask_steps=0", "stage.cut.recover_steps=3"]
    changes += ["stage.cut.importance=taylor", cut(preset), "teacher.pairs=8", "report.latency=false"]
    recipe, save, saved = recipe_of(preset, "-compress"), stage.Stepper.save, []

    def stop(self, *arguments):
        saved.append(save(self, *arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage.Stepper, "save", stop)
        stopped = antgmm("compress", recipe, "runs/student", *changes)
    assert stopped.exit_code != 0 and len(saved) == 1, stopped.output
    assert not Path("runs/student/export").exists()
    resumed = antgmm("compress", recipe, "runs/student", *changes)
    assert resumed.exit_code == 0, resumed.output
    gate = json.loads(Path("runs/student/report/gate.json").read_text())
    assert gate["passed"] and gate["answers_equal"] == 1.0 and gate["prompts"] == 8
    assert "not measured" in Path("runs/student/report/report.md").read_text() and "not measured" in resumed.output
    assert_prompts(load_recipe(recipe, changes), "runs/student/export", preset)


@pytest.mark.long
@pytest.mark.parametrize("preset", [name for name in CONVERSING if name not in RESUMED])
def test_prompts_of_200_conversations_equal_the_processors(tmp_path, monkeypatch, preset):
    changes = conversations(tmp_path, monkeypatch, preset)
    assert_prompts(load_recipe(recipe_of(preset, "-compress"), changes), "teacher", preset)


def conversations(folder, monkeypatch, preset):
    """Writes conversations and an untrained teacher to a folder; returns the changes of the recipe to use them."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    for split, count in (("train", 200), ("test", 8)):
        if preset in CHATLESS:
            write_jsonl(maad.source("s", split, count), folder / "ads" / f"{split}.jsonl")
            as_conversations(folder / "ads" / f"{split}.jsonl")
        else:
            write_chat(maad.source("s", split, count), folder / "ads" / f"{split}.jsonl")
    save_untrained(preset, "teacher")
    changes = [change for change in tiny(preset) if not change.startswith(("model", "phase", "data.samples"))]
    return [*changes, "teacher.path=teacher"]


def assert_prompts(recipe, model, preset):
    """Asserts that prompts are those of the processor of a model's folder."""
    config, processor = open_hf(model)[0], load_processor(model)
    samples, test = encode_both(recipe, load_both(recipe), processor, config)
    assert len(samples) == 200
    if preset not in CHATLESS:
        # Both answers of a row are trained on; the second one is generated behind the first.
        assert (samples.rows.index.earlier > 1).all() and (samples.rows.index.slots >= 2).all()
    (batch,) = test.in_order(8, prompts=True)
    for row, record in enumerate(load_both(recipe)[1]):
        if preset in CHATLESS:
            chat = record.question
        else:
            chat = processor.apply_chat_template(messages(record.turns), add_generation_prompt=True)
        expected = processor(images=[*record.images], text=chat, return_tensors="np")["input_ids"][0]
        mask = batch["prompt/attention_mask"][row] == 1
        np.testing.assert_array_equal(batch["prompt/input_ids"][row][mask], expected)


@pytest.mark.long
def test_a_resumed_training_ends_with_the_same_arrays(ads, monkeypatch):
    recipe = load_training(RECIPES / "own-data.toml", [*tiny("llava-tiny"), "checkpoint_every=1"])
    save, saved = stage.Stepper.save, []

    def stop(self, *arguments):
        saved.append(save(self, *arguments))
        if len(saved) == 2:
            raise KeyboardInterrupt
        return saved[-1]

    monkeypatch.setattr(stage.Stepper, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        finish(Run(recipe, "stopped"))
    monkeypatch.undo()
    monkeypatch.chdir(ads)
    for run in ("stopped", "whole"):
        finish(Run(recipe, run))
    (mine, one), (theirs, other) = (checkpoint.load_stage(f"{run}/stages/01-answers") for run in ("stopped", "whole"))
    for name in mine["params"]:
        _same(mine["params"][name], theirs["params"][name])
    assert one["metrics"]["history"] == other["metrics"]["history"]
    assert [point["step"] for point in other["metrics"]["history"]] == [3]
    assert load_hf("stopped/export")[0] == load_hf("whole/export")[0]


@pytest.mark.long
def test_training_continues_from_the_parameters_of_a_checkpoint(ads):
    teacher, like = save_llava(ads / "mine"), ["model={path='mine'}", "phase.answers.frozen=['vision']"]
    changes = [
        change
        for change in tiny("llava-tiny")
        if not change.startswith(("model.sizes", "model.preset")) and change != FROZEN
    ]
    assert antgmm("train", RECIPES / "own-data.toml", "run", *changes, *like).exit_code == 0
    (config, before), (same, after) = load_hf(teacher), load_hf("run/export")
    assert same == config
    _same(before["vision"], after["vision"])
    moved = jax.tree.map(lambda old, new: np.abs(new - old).max(), before["language"], after["language"])
    # Three steps of AdamW move a parameter by about three learning rates; other initial parameters differ more.
    assert 0 < max(jax.tree.leaves(moved)) < 5e-3
    assert read_book(ads / "run" / "inputs.json")["model"] == teacher_key(config, before)
    tokenizers = [AutoProcessor.from_pretrained(folder).tokenizer for folder in (teacher, "run/export")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def _same(left, right):
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            _same(left[name], right[name])
    else:
        np.testing.assert_array_equal(left, right)
