"""Errors in a user's own rows and models, and what a run prints about them."""

import json
import shutil

import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from data.rows import parse
from experiments.run.pipeline import Run
from experiments.run.rows.datasets import encode_both, load_both
from experiments.run.schema.recipe import load_recipe, load_training
from experiments.run.training import shape_of
from tests.experiments.own_data import RECIPES, ROOT, antgmm, recipe_of, tiny
from tests.experiments.tiny import save_llava, save_teacher

# Commands may cause warnings of PyTorch and transformers.
pytestmark = pytest.mark.filterwarnings("default")


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


def test_a_run_warns_of_rows_beyond_the_positions_and_of_a_chat_template_that_is_not_used(ads, capsys):
    model = save_llava(ads / "m")
    (model / "chat_template.jinja").unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    of_texts = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": of_texts}))
    changes = ["data.samples=24", "evaluate.data.samples=8", f"teacher.path={model}"]
    recipe = load_recipe(RECIPES / "own-data-compress.toml", changes)

    def encoded_with_warnings():
        both = encode_both(recipe, load_both(recipe), load_processor(model), load_hf(model)[0])
        lengths = [each.rows.index.prompt + each.rows.index.answer for each in both]
        lines = capsys.readouterr().err.splitlines()
        return np.concatenate(lengths), [line for line in lines if line.startswith("warning: ")]

    lengths, (template,) = encoded_with_warnings()
    assert "the tokenizer has a chat template that cannot write a picture, and it is not used" in template
    fields = json.loads((model / "config.json").read_text())
    fields["text_config"]["max_position_embeddings"] = most = int(np.median(lengths))
    (model / "config.json").write_text(json.dumps(fields))
    _, (_, rows) = encoded_with_warnings()
    assert rows == (
        f"warning: {(lengths > most).sum()} rows for training and evaluation have more tokens than the {most} positions"
        f" of {model}: shorten or remove them"
    )


def test_a_copy_of_the_training_rows_is_no_test_set(ads):
    shutil.copy(ads / "ads/train.jsonl", ads / "ads/copy.jsonl")
    changes = ["data.samples=24", "evaluate.data.samples=24", "evaluate.data.path=ads/copy.jsonl"]
    recipe = load_recipe(RECIPES / "own-data-compress.toml", [*changes, f"teacher.path={save_llava(ads / 'm')}"])
    with pytest.raises(AntgmmError, match=r"copy\.jsonl has the rows of .*train\.jsonl: evaluate on other rows"):
        encode_both(recipe, load_both(recipe), load_processor(ads / "m"), load_hf(ads / "m")[0])


def test_a_copy_of_the_training_rows_is_no_hard_set(ads):
    shutil.copy(ads / "ads/train.jsonl", ads / "ads/copy.jsonl")
    changes = ["data.samples=24", "evaluate.data.samples=8", "evaluate.hard={path='ads/copy.jsonl', samples=24}"]
    changes += ["stage.cut.sizes={'vision/layers'=1}"]
    recipe = load_recipe(RECIPES / "own-data-compress.toml", [*changes, f"teacher.path={save_llava(ads / 'm')}"])
    with pytest.raises(AntgmmError, match=r"copy\.jsonl has the rows of .*train\.jsonl: evaluate on other rows"):
        Run(recipe, ads / "run").finish_stages()
    assert not (ads / "run" / "stages").exists()


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
    remedy = 'or raise max_length and max_answer, or leave them out (too_long = "drop" in the table of the data)'
    assert head.endswith(f"3 of 24 rows are too long; shorten or remove them, {remedy}")
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


def test_sizes_override_the_preset_and_its_tied_sizes():
    recipe = load_training(RECIPES / "own-data.toml", ['model.sizes={"vision/embed"=64, "text/embed"=320}'])
    config = shape_of(recipe)
    assert (config.vision.stack.embed, config.vision.stack.heads) == (64, 1)
    assert (config.language.decoder.embed, config.bridge.mlp) == (320, 320)


@pytest.mark.long
def test_rows_in_the_guide_are_valid():
    page = (ROOT / "docs" / "guides" / "your-data.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```json\n")[1:]]
    rows = [line for block in blocks for line in block.splitlines()]
    parsed = [parse(json.loads(row)) for row in rows]
    assert [(len(row.images), len(row.turns)) for row in parsed] == [(1, 0), (1, 3), (2, 4), (1, 1)]
