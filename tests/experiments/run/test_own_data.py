"""A user's own rows, from JSONL and pictures to an exported student, and errors in rows and models."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor
from typer.testing import CliRunner

import data.maad as maad
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import inputs
from antgmm_jax.families.common.words import user_turn
from antgmm_jax.io import checkpoint
from antgmm_jax.io.convert import load_hf, open_hf
from data.chat import messages
from data.readers import read_records
from data.record import prompt
from data.rows import parse
from data.writers import write_chat, write_jsonl
from experiments import cli
from experiments.report.write import finish
from experiments.run import stage
from experiments.run.datasets import encode_both, load_both
from experiments.run.pipeline import Run
from experiments.run.samples import load_processor
from experiments.run.schema.recipe import load_recipe, load_training
from experiments.run.training import shape_of
from tests import reference
from tests.experiments.tiny import save_llava, save_qwen3_vl, save_smolvlm, save_teacher

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "experiments" / "recipes"
# Commands may cause warnings of PyTorch and transformers.
pytestmark = pytest.mark.filterwarnings("default")

_IMAGE = '"vision/layers"=2, "vision/embed"=64, "vision/mlp"=96'
_QUERIES = f'{_IMAGE}, "bridge/layers"=2, "bridge/embed"=64, "bridge/mlp"=96'
_T5 = f'{_QUERIES}, "encoder/layers"=2, "decoder/layers"=2, "text/embed"=48, "encoder/heads"=2, "encoder/mlp"=64'
_TEXT = '"text/layers"=2, "text/mlp"=64'
SMALL = {
    "antgmm-tiny": _T5,
    "instructblip-tiny": _T5,
    "instructblip-llama-tiny": f'{_QUERIES}, {_TEXT}, "text/heads"=1, "text/embed"=96',
    "blip2-opt-tiny": f'{_QUERIES}, {_TEXT}, "text/heads"=2',
    "llava-tiny": f'{_IMAGE}, {_TEXT}, "text/heads"=1, "text/embed"=48',
    "llava-onevision-tiny": f'{_IMAGE}, {_TEXT}, "text/heads"=1, "text/embed"=96',
    "smolvlm-tiny": f'{_IMAGE}, {_TEXT}, "text/heads"=1, "text/embed"=48',
    "internvl-tiny": f'{_IMAGE}, {_TEXT}, "text/heads"=1, "text/embed"=96',
    "qwen3-vl-tiny": f'{_IMAGE}, {_TEXT}, "text/heads"=1, "text/embed"=48',
    "qwen2.5-vl-tiny": f'{_IMAGE}, {_TEXT}, "text/heads"=1',
    "gemma3-tiny": f'{_IMAGE}, {_TEXT}, "text/heads"=1, "text/embed"=48',
    "ministral-3-tiny": f'{_IMAGE}, {_TEXT}, "text/heads"=1, "text/embed"=48',
}
"""Sizes of a teacher that takes seconds, for a preset of each family."""
ENCODERS = ("antgmm-tiny", "instructblip-tiny")
"""Presets of models with an encoder: they have recipes of their own."""
CHATLESS = ("antgmm-tiny", "blip2-opt-tiny", "instructblip-tiny", "instructblip-llama-tiny")
"""Presets of models without a chat template."""
SHORT = ("antgmm-tiny", "llava-tiny")
"""Presets that every run of the tests compresses; the other families share most of their code with these."""
ASKED = "Question: {question}[ ({text})] Answer:"
FROZEN = 'phase.answers.frozen=["vision", "bridge"]'


@pytest.fixture
def ads(tmp_path, monkeypatch):
    """The working folder; it holds `ads/train.jsonl`, `ads/test.jsonl` and pictures."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    for split, rows in (("train", 24), ("test", 8)):
        write_jsonl(maad.source("s", split, rows), tmp_path / "ads" / f"{split}.jsonl")
    return tmp_path


def antgmm(command, recipe, run, *changes):
    options = [word for change in changes for word in ("--set", change)]
    return CliRunner().invoke(cli.app, [command, str(recipe), "--run", str(run), *options], prog_name="antgmm")


def recipe_of(preset, ending=""):
    """The packaged recipe that trains a preset or, with the ending "-compress", compresses it."""
    return RECIPES / f"own-data{'-t5' if preset in ENCODERS else ''}{ending}.toml"


def cut(preset):
    """The change of a packaged recipe that halves the layers of a small model."""
    if preset in ENCODERS:
        sizes = '"vision/layers"=1, "bridge/layers"=1, "encoder/layers"=1, "decoder/layers"=1, "text/embed"=32'
    else:
        sizes = '"vision/layers"=1, "text/layers"=1, "text/mlp"=0.5'
    return f"stage.cut.sizes={{{sizes}}}"


def tiny(preset):
    """Changes to a packaged training recipe that make it take seconds."""
    changes = ("optimizer.batch_size=8", "optimizer.warmup=1", "data.samples=24", "evaluate.data.samples=8")
    changes = [*changes, "evaluate.max_new_tokens=4", "export.dtype=float32"]
    return [
        *changes,
        f"model.preset={preset}",
        f"model.sizes={{{SMALL[preset]}}}",
        "phase.answers.steps=3",
        FROZEN,
    ]


def as_conversations(file):
    """Rewrites the rows of a file as conversations in LLaVA's format."""
    rows = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        turns = [
            {"from": "human", "value": f"<image>\n{prompt(row.pop('question'), row.pop('text', ''), ASKED)}"},
            {"from": "gpt", "value": row.pop("answer")},
        ]
        rows.append(json.dumps({**row, "conversations": turns}) + "\n")
    file.write_text("".join(rows))


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[pytest.mark.long] * (name not in SHORT)) for name in SMALL]
)
def test_a_users_rows_become_an_exported_student(ads, preset):
    if preset == "llava-tiny":
        for split in ("train", "test"):
            as_conversations(ads / "ads" / f"{split}.jsonl")
    teacher = ["teacher.path=runs/teacher/export"]
    taught = [*tiny(preset), "buckets=[]", f'prompt="{ASKED}"']
    trained = antgmm("train", recipe_of(preset), "runs/teacher", *taught)
    assert trained.exit_code == 0, trained.output
    changes = teacher + [change for change in tiny(preset) if not change.startswith(("model", "phase"))]
    # Compilation takes most of the time: few steps, no mask phase, and scores without gradients.
    stage = ["stage.cut.importance=magnitude", "stage.cut.mask_steps=0", "stage.cut.recover_steps=2"]
    recipe, sizes = recipe_of(preset, "-compress"), cut(preset)
    compressed = antgmm("compress", recipe, "runs/student", *changes, *stage, sizes)
    assert compressed.exit_code == 0, compressed.output
    gate = json.loads((ads / "runs/student/report/gate.json").read_text())
    assert gate["passed"] and gate["answers_equal"] == 1.0 and gate["prompts"] == 8
    # The student inherits the teacher's prompt template, and the export records it.
    assert json.loads((ads / "runs/student/export/antgmm.json").read_text()) == {"prompt": ASKED}
    config, processor = open_hf(ads / "runs/student/export")[0], load_processor(ads / "runs/student/export")
    recipe = load_recipe(recipe, [*changes, *stage, sizes])
    records, reads = load_both(recipe), inputs(config, processor)
    (batch,) = encode_both(recipe, records, processor, config)[1].in_order(8, prompts=True)
    for row, record in enumerate(records[1]):
        # Rows of conversations hold the words already.
        words = record.question if record.turns else prompt(record.question, record.text, ASKED)
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
    changes += ["stage.cut.mask_steps=1", "stage.cut.recover_steps=2"]
    changes += ['stage.cut.sizes={"vision/mlp"=0.5, "text/mlp"=0.5, "text/embed"=0.5}']
    done = antgmm("compress", recipe, "runs/tiles", *changes)
    assert done.exit_code == 0, done.output
    gate = json.loads((ads / "runs/tiles/report/gate.json").read_text())
    assert gate["passed"] and gate["answers_equal"] == 1.0 and gate["prompts"] == 8


def _runs_in_transformers(directory, rows, preset):
    """Loads and runs the exported folder with `transformers` alone."""
    model, processor = reference.reloaded(directory), AutoProcessor.from_pretrained(directory)
    assert model.config.vision_config.num_hidden_layers == 1
    text = model.config.text_config
    assert (text.num_layers, text.d_model) == (1, 32) if preset in ENCODERS else text.num_hidden_layers == 1
    special = processor.tokenizer
    assert (text.pad_token_id, text.eos_token_id) == (special.pad_token_id, special.eos_token_id)
    record = read_records("jsonl", rows / "test.jsonl")[0]
    line = inputs(open_hf(directory)[0], processor).chat(user_turn(prompt(record.question, record.text), 1))
    given = processor(images=record.images[0], text=line, return_tensors="pt")
    assert model.generate(**given, max_new_tokens=3).shape[0] == 1


_RESUMED = ("smolvlm-tiny", "qwen3-vl-tiny", "gemma3-tiny", *CHATLESS)


@pytest.mark.parametrize("preset", ["llava-tiny", *(pytest.param(name, marks=pytest.mark.long) for name in _RESUMED)])
def test_200_conversations_are_compressed_by_a_run_that_resumes_once(tmp_path, monkeypatch, preset):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for split, count in (("train", 200), ("test", 8)):
        if preset in CHATLESS:
            write_jsonl(maad.source("s", split, count), tmp_path / "ads" / f"{split}.jsonl")
            as_conversations(tmp_path / "ads" / f"{split}.jsonl")
        else:
            write_chat(maad.source("s", split, count), tmp_path / "ads" / f"{split}.jsonl")
    changes = [change for change in tiny(preset) if not change.startswith("data.samples")]
    trained = antgmm("train", recipe_of(preset), "runs/teacher", *changes, "buckets=[]")
    assert trained.exit_code == 0, trained.output
    changes = [change for change in changes if not change.startswith(("model", "phase"))]
    changes += [
        "checkpoint_every=1",
        "stage.cut.mask_steps=0",
        "stage.cut.recover_steps=3",
        "stage.cut.importance=taylor",
    ]
    changes += [cut(preset), "teacher.path=runs/teacher/export", "teacher.pairs=8"]
    recipe, save, saved = recipe_of(preset, "-compress"), stage.Stepper.save, []

    def stop(self, *arguments):
        saved.append(save(self, *arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage.Stepper, "save", stop)
        assert antgmm("compress", recipe, "runs/student", *changes).exit_code != 0
    assert len(saved) == 1 and not Path("runs/student/export").exists()
    resumed = antgmm("compress", recipe, "runs/student", *changes)
    assert resumed.exit_code == 0, resumed.output
    gate = json.loads(Path("runs/student/report/gate.json").read_text())
    assert gate["passed"] and gate["answers_equal"] == 1.0 and gate["prompts"] == 8
    recipe = load_recipe(recipe, changes)
    config, processor = open_hf("runs/student/export")[0], load_processor("runs/student/export")
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


def test_a_run_counts_the_rows_that_it_leaves_out(ads, capsys):
    rows = [json.loads(line) for line in (ads / "ads/train.jsonl").read_text().splitlines()]
    for row in rows[3:6]:
        row["text"] = "word " * 600
    (ads / "ads/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [
        "data.samples=24",
        "evaluate.data.samples=8",
        "data.too_long=drop",
        f"teacher.path={save_llava(ads / 'm')}",
    ]
    recipe = load_recipe(RECIPES / "own-data-compress.toml", changes)
    samples, test = encode_both(recipe, load_both(recipe), load_processor(ads / "m"), load_hf(ads / "m")[0])
    assert (len(samples), len(test)) == (21, 8)
    assert samples.names(np.arange(2, 5)) == [rows[place]["id"] for place in (2, 6, 7)]
    assert "ads/train.jsonl: 3 of 24 records are too long and are left out" in capsys.readouterr().err
    batches = samples.shuffled(7, 0)
    visited = np.concatenate([next(batches)["index"] for _ in range(3)])
    np.testing.assert_array_equal(np.sort(visited), np.arange(21))


def test_a_recipes_prompt_is_used_in_training_and_evaluation(ads):
    change = 'prompt="Question: {question}[ ({text})] Answer:"'
    recipe = load_recipe(RECIPES / "own-data-t5-compress.toml", ["data.samples=24", "evaluate.data.samples=8", change])
    config, processor = load_hf(save_teacher(ads / "teacher"))[0], load_processor(ads / "teacher")
    for records, samples in zip(
        load_both(recipe), encode_both(recipe, load_both(recipe), processor, config), strict=True
    ):
        words = [f"Question: {r.question} ({r.text}) Answer:" for r in records]
        lines = [line.replace(" ()", "") for line in words]
        expected = processor.tokenizer(lines)["input_ids"]
        (batch,) = samples.in_order(len(samples), prompts=True)
        for name in ("", "prompt/"):
            ids, mask = batch[f"{name}input_ids"], batch[f"{name}attention_mask"]
            assert [
                row[real == 1].tolist()[config.image_tokens :] for row, real in zip(ids, mask, strict=True)
            ] == expected


@pytest.mark.parametrize("command", ["train", "compress"])
@pytest.mark.parametrize("preset", ["antgmm-tiny", "llava-tiny"])
def test_bad_rows_are_listed_together_before_training(ads, command, preset):
    rows = [json.loads(line) for line in (ads / "ads/train.jsonl").read_text().splitlines()]
    whole = dict(enumerate(rows, 1))
    (ads / "ads/text.png").write_text("no picture")
    bad = whole | {
        2: {**whole[2], "image": "images/none.png"},
        3: {**whole[3], "image": "text.png"},
        4: {**whole[4], "image": "../recipe.toml"},
        5: {**whole[5], "question": " "},
        6: {**whole[6], "answer": 5},
        7: {**whole[7], "id": whole[1]["id"]},
    }
    long = whole | {
        2: {**whole[2], "text": "word " * 600},
        3: {**whole[3], "answer": "very " * 90},
        4: {**whole[4], "question": "why? " * 600, "answer": "so " * 90},
    }
    save = save_teacher if preset == "antgmm-tiny" else save_llava
    recipe = recipe_of(preset, "" if command == "train" else "-compress")
    changes = [c for c in tiny(preset) if command == "train" or not c.startswith(("model", "phase"))]
    if command == "compress":
        changes += [f"teacher.path={save(ads / 'teacher')}", "stage.cut.sizes={'vision/layers'=1}"]

    def errors_of(rows):
        (ads / "ads/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
        result = antgmm(command, recipe, "run", *changes)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert not (ads / "run").exists()
        return result.stderr.partition("error: ")[2].splitlines()

    head, *reasons = errors_of(bad)
    assert head == "ads/train.jsonl: 6 of 24 rows are invalid; correct or remove them"
    expected = {2: "none.png is missing", 3: "cannot be decoded", 4: "leaves the data folder", 5: "question is empty"}
    expected |= {6: "answer is a int, not text", 7: f"id {whole[1]['id']!r} is also that of line 1"}
    assert len(reasons) == len(expected)
    for (line, reason), error in zip(expected.items(), reasons, strict=True):
        assert error.startswith(f"line {line}: ") and reason in error
    head, *reasons = errors_of(long)
    assert head.endswith("3 of 24 rows are too long; shorten or remove them, or raise max_length and max_answer")
    assert head.startswith("ads/train.jsonl: ")
    parts = [(2, "prompt", 512), (3, "answer", 64), (4, "prompt", 512), (4, "answer", 64)]
    assert len(reasons) == len(parts)
    for (line, part, limit), error in zip(parts, reasons, strict=True):
        assert error.startswith(f"{whole[line]['id']}: {part} of ") and error.endswith(f" tokens, at most {limit}")


def test_errors_of_both_files_are_listed_together(ads):
    (ads / "ads/test.jsonl").write_text("{}\n")
    (ads / "ads/train.jsonl").write_text("[]\n")
    result = antgmm("train", RECIPES / "own-data.toml", "run")
    assert result.exit_code == 2
    for file in ("train", "test"):
        assert f"ads/{file}.jsonl: 1 of 1 rows are invalid" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.preset=llava-huge", "unknown preset 'llava-huge'"),
        ('model.sizes={"text/leyers"=1}', "model.sizes: unknown axis text/leyers: this model has"),
        ('model.sizes={"vision/embed"=100}', "model.sizes: vision/embed = 100 is not a multiple of 64"),
        ('model.sizes={"text/embed"=90}', "model.sizes: transformers cannot load this shape: text/embed = 90 must be"),
        ('model.sizes={"text/embed"=0.5}', 'model.sizes."text/embed" = 0.5: Input should be a valid integer'),
    ],
)
def test_an_impossible_model_is_refused_and_leaves_nothing(ads, change, message):
    result = antgmm("train", RECIPES / "own-data.toml", "run", change)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 2  # the first line, and the error
    assert message in result.stderr
    assert not (ads / "run").exists()


def test_a_facts_phase_needs_a_model_with_queries():
    with pytest.raises(AntgmmError, match="phase 'facts' needs a bridge with a stack, which llava-tiny does not have"):
        shape_of(load_training(RECIPES / "teacher-m.toml", ["model.preset=llava-tiny"]))


def test_sizes_override_the_preset_and_its_tied_sizes():
    recipe = load_training(RECIPES / "own-data.toml", ['model.sizes={"vision/embed"=64, "text/embed"=320}'])
    config = shape_of(recipe)
    assert (config.vision.stack.embed, config.vision.stack.heads) == (64, 1)
    assert (config.language.decoder.embed, config.bridge.mlp) == (320, 320)


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
    tokenizers = [AutoProcessor.from_pretrained(folder).tokenizer for folder in (teacher, "run/export")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def _same(left, right):
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            _same(left[name], right[name])
    else:
        np.testing.assert_array_equal(left, right)


def test_rows_in_the_guide_are_valid():
    page = (ROOT / "docs" / "guides" / "your-data.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```json\n")[1:]]
    rows = [line for block in blocks for line in block.splitlines()]
    parsed = [parse(json.loads(row)) for row in rows]
    assert [(len(row.images), len(row.turns)) for row in parsed] == [(1, 0), (1, 3), (2, 4), (1, 1)]
