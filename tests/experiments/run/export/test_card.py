"""The files of an export beside the model: its card, the settings of generation, and a finite length."""

import contextlib
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import ExifTags, Image, ImageOps
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, GenerationConfig

import pruning
from antgmm_jax.families import FAMILIES, new_processor
from antgmm_jax.families.common.words import BOS, EOS, PAD
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.presets import preset
from data.files import decode_image
from data.record import PROMPT, Record
from data.tokenizer import corpus, train_tokenizer
from experiments.run.disk_cut import cut
from experiments.run.export.card import QUESTION, TEXT, Origin, Score, licence, title_of, write_card
from experiments.run.export.publishing import Questions, publish
from experiments.run.export.served_prompt import conversations
from experiments.run.rows.prompts import note_prompt
from experiments.run.rows.random_batches import random_batch
from experiments.run.rows.samples import Samples
from experiments.run.scores.evaluation import evaluate
from pruning.costs import parameters
from tests.experiments.tiny import save_llava, save_teacher
from tests.marks import long

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
RECORD = Record(images=(IMAGE,), question=QUESTION, text=TEXT, answer="$5")
SCORES = {"count": 8, "exact_match": 0.75, "rouge_l": 0.9, "by_type": {"price": 0.5, "a|b": 1.0}}


def published(save, folder):
    """A teacher with a card, and a student with fewer FFN units, published with a check."""
    teacher = save(folder / "teacher")
    (teacher / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n")
    (teacher / "LICENSE").write_text("Do what you like.")
    (teacher / "training.json").write_text("{}")
    config, params = load_hf(teacher)
    keep = pruning.plan(pruning.magnitude(params, config), config, {"vision/mlp": 16})
    smaller, kept = pruning.shrink(config, params, keep)
    samples = Samples([RECORD], load_processor(teacher), smaller)
    questions = Questions([random_batch(smaller, 2)], 2, EOS, PAD, conversations(samples, 1))
    origin = Origin("pruned and distilled", str(teacher), taught=True)
    student = folder / "student"
    publish(smaller, kept, student, teacher, dtype="float32", prompt=PROMPT, origin=origin, questions=questions)
    return teacher, student, samples


@pytest.mark.parametrize("save", [save_llava, long(save_teacher)])
def test_an_export_has_what_servers_and_readers_need(save, monkeypatch, tmp_path):
    teacher, student, samples = published(save, tmp_path)
    card = ModelCard.load(student / "README.md")
    kind = json.loads((student / "config.json").read_text())["model_type"]
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "other",
        "license_name": "mine",
        "license_link": "LICENSE",
        "tags": ["antgmm-jax", "pruned", "distilled", kind],
    }
    assert (student / "LICENSE").read_text() == "Do what you like."
    assert not (student / "training.json").exists()
    assert (teacher / "training.json").exists()

    GenerationConfig.from_pretrained(student).validate(strict=True)
    config, params = load_hf(student)
    expected = {"eos_token_id": EOS, "pad_token_id": PAD}
    expected |= {"decoder_start_token_id": PAD} if config.encoder_decoder else {"bos_token_id": BOS}
    written = json.loads((student / "generation_config.json").read_text())
    assert {name: value for name, value in written.items() if name.endswith("_id")} == expected
    assert AutoTokenizer.from_pretrained(student).model_max_length in (2048, 4096)

    before, after = (sum(parameters(load_hf(folder)[0]).values()) for folder in (teacher, student))
    assert f"| total | {after / 1e3:.3g} k | {before / 1e3:.3g} k | {before / after:.1f}x |" in card.text
    assert "| `vision/mlp` | 16 | 48 |" in card.text
    assert "PyTorch was compared with JAX on 2 prompts: 100 % of the answers are equal" in card.text
    assert "This model has not been scored" in card.text
    assert PROMPT in card.text
    assert str(tmp_path) not in card.text
    assert ("vllm serve" in card.text) is (FAMILIES[config.family].vllm(config) is not None)

    # The example for transformers answers as JAX does.
    Image.fromarray(IMAGE).save(student / "image.png")
    monkeypatch.chdir(student)
    (example,) = (block for block in re.findall(r"```python\n(.+?)```", card.text, re.S) if "AutoProcessor" in block)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(example, "README.md", "exec"), {})
    _, answers = evaluate(config, params, samples, load_processor(student), max_new_tokens=32)
    assert printed.getvalue().strip() == answers[0]


def test_scores_of_both_models_are_in_the_card(tmp_path):
    teacher = save_llava(tmp_path / "teacher")
    config, _ = load_hf(teacher)
    scores = [Score("`test.jsonl`", SCORES, {**SCORES, "exact_match": 0.8, "rouge_l": 0.95, "by_type": {"price": 0.6}})]
    write_card(teacher, config, Origin("trained", ""), PROMPT, title="mine", scores=scores)
    text = (teacher / "README.md").read_text()
    assert "# mine\n\nA vision-language model, trained with antgmm-jax." in text
    assert "Exact match on `test.jsonl`, 8 questions, and ROUGE-L, which says more about free text:" in text
    assert "| mean over types | 0.750 | 0.800 |\n| price | 0.500 | 0.600 |\n| a_b | 1.000 | nan |\n" in text
    assert "| ROUGE-L of all | 0.900 | 0.950 |\n" in text
    assert "These files were not compared" in text


def test_names_and_prompts_of_strangers_stay_text(tmp_path):
    teacher = save_llava(tmp_path / "x](http:--evil) | `a` <b>")
    config, _ = load_hf(teacher)
    template = "q\n```\n## Owned\n<script> \u202e\x1b[31m{question}"
    title, kind = "a\n# Owned <b>", {"<b>|`": 1.0}
    note_prompt(teacher, template)
    scores = [Score("`test.jsonl`", {**SCORES, "by_type": kind})]
    write_card(teacher, config, Origin("pruned", str(teacher)), template, title=title, scores=scores)
    text = (teacher / "README.md").read_text()
    assert "\n# a # Owned _b_\n" in text
    assert "from `x_(http:--evil) _ _a_ _b_` with" in text
    assert "\n````text\nq\n```\n## Owned\n<script> \\u202e\\x1b[31m{question}\n````\n" in text
    assert "\n| _b___ | 1.000 |\n" in text
    assert not {"\x1b", "\u202e"} & {*text}


@pytest.mark.parametrize("recorded", [False, True])
def test_a_prompt_that_is_not_recorded_is_not_called_that_of_training(recorded, tmp_path):
    teacher = save_llava(tmp_path / "teacher")
    if recorded:
        note_prompt(teacher, PROMPT)
    cut(teacher, {"vision/mlp": 16}, tmp_path / "out", records=None)
    text = (tmp_path / "out" / "README.md").read_text()
    assert ("The template of training" in text) is recorded
    assert (PROMPT in text) is recorded
    assert (f'"text": {QUESTION!r}' in text) is not recorded
    assert ("No prompt of training is recorded" in text) is not recorded


@pytest.mark.parametrize(("most", "length"), [(262144, 4096), (2048, 2048)])
def test_a_server_makes_room_for_a_question_and_not_for_the_longest_conversation(most, length, tmp_path):
    teacher = save_llava(tmp_path / "teacher")
    config, fields = load_hf(teacher)[0], json.loads((teacher / "config.json").read_text())
    fields["text_config"]["max_position_embeddings"] = most
    (teacher / "config.json").write_text(json.dumps(fields))
    write_card(teacher, config, Origin("trained", ""), PROMPT, title="mine")
    text = (teacher / "README.md").read_text()
    assert f"--max-model-len {length}\n" in text
    assert (f"longer conversations need\nmore, up to {most}" in text) is (most > length)


@pytest.mark.parametrize(("name", "count"), [("llava-tiny", 1), ("blip2-opt-tiny", 2)])
def test_pictures_of_the_examples_are_read_as_in_training(name, count, tmp_path, monkeypatch):
    """The model without a chat template has an example for vLLM's Python interface too."""
    config = preset(name)
    new_processor(config, train_tokenizer(corpus("s", 200), vocab=256, min_frequency=2)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[config.family].to_hf(config)))
    write_card(tmp_path, config, Origin("trained", ""), PROMPT, title="mine")
    text = (tmp_path / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    turned = Image.new("L", (1, 1)).getexif()
    turned[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.dstack([IMAGE, IMAGE[..., 0]])).save("image.png", exif=turned)
    examples = re.findall(r"^image = ImageOps.+\n^image = .+\n", text, re.M)
    assert len(examples) == text.count("Image.open") == count
    for example in examples:
        names = {"Image": Image, "ImageOps": ImageOps}
        exec(example, names)
        assert names["image"].size == IMAGE.shape[:2]  # turned
        np.testing.assert_array_equal(np.asarray(names["image"]), decode_image(tmp_path / "image.png"))


def test_the_base_model_is_named_if_it_comes_from_the_hub(tmp_path):
    snapshot = save_llava(tmp_path / "models--org--tiny" / "snapshots" / "0")
    config, _ = load_hf(snapshot)
    model = save_llava(tmp_path / "model")
    for source, named in ((snapshot, "org/tiny"), (save_llava(tmp_path / "local"), None)):
        write_card(model, config, Origin("trained", str(source)), PROMPT, title="mine")
        assert ModelCard.load(model / "README.md").data.to_dict().get("base_model") == named


def test_shrink_completes_its_export_and_keeps_further_end_tokens(tmp_path):
    teacher = save_llava(tmp_path / "teacher")
    sampling = {"eos_token_id": [7, EOS], "do_sample": False, "temperature": 0.1, "top_k": 3}
    (teacher / "generation_config.json").write_text(json.dumps(sampling))  # transformers refuses to save it
    (teacher / "antgmm.json").write_text(json.dumps({"prompt": "Q: {question}"}))
    cut(teacher, {"vision/mlp": 16}, tmp_path / "out", records=None)
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    settings.validate(strict=True)
    assert settings.eos_token_id == [EOS, 7]
    assert settings.temperature is None and settings.top_k is None
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# out\n\nA vision-language model, pruned by magnitude, without training, from `teacher`" in text
    assert "Q: {question}" in text and f"'Q: {QUESTION}'" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "teacher"]


@pytest.mark.parametrize(
    ("card", "config", "fields"),
    [
        ("---\nlicense: mit\n---\n", {}, {"license": "mit"}),
        ("# no front matter", {"license": "apache-2.0"}, {"license": "apache-2.0"}),
        ("---\nlicense: [\n---\n", {}, {}),
        ("---\n- license\n---\n", {}, {}),
        ("---\nlicense: 'a\n\n  b'\n---\n", {}, {}),
    ],
)
def test_the_licence_is_that_of_the_source(tmp_path, card, config, fields):
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert licence(str(tmp_path)) == fields
    assert licence("") == {}


@pytest.mark.parametrize(
    ("place", "title"),
    [("runs/ads/export", "ads"), ("runs/ads-keep-98/3/export", "ads-keep-98-3"), ("students/small", "small")],
)
def test_a_card_is_titled_by_its_run_and_search(place, title, tmp_path):
    assert title_of(tmp_path / place) == title


def test_vllm_serves_what_the_families_say():
    served = {name: FAMILIES[preset(name).family].vllm(preset(name)) for name in ("antgmm-tiny", "blip2-opt-tiny")}
    assert served == {"antgmm-tiny": None, "blip2-opt-tiny": ""}


def test_vllm_counts_large_pictures_by_a_constant_of_its_own():
    config = preset("llava-onevision-tiny")
    vllm = FAMILIES[config.family].vllm
    assert vllm(replace(config, most_tiles=9)) == "one image per conversation"
    assert "as for 9 tiles, and this model reads 4" in vllm(replace(config, most_tiles=4))


def test_the_package_that_a_processor_needs_is_named():
    config = preset("smolvlm-tiny")
    vllm = FAMILIES[config.family].vllm
    assert "`pip install num2words`" in vllm(replace(config, model_type="smolvlm"))
    assert vllm(replace(config, model_type="idefics3")) == ""


@pytest.mark.parametrize(
    ("named", "in_both"),
    [(40, False), (BOS, False), (BOS, True)],
    ids=["a word", "the start token", "the start token in both files"],
)
def test_answers_end_with_the_token_of_the_models_files(named, in_both, tmp_path):
    """BLIP-2 with OPT ends answers with a line break, not with its tokenizer's end token, and reads it in text_config.

    InstructBLIP's files name the start token there and in generation_config.json; it ends no answer.
    """
    teacher = save_teacher(tmp_path / "teacher")
    (teacher / "chat_template.jinja").unlink(missing_ok=True)
    (teacher / "generation_config.json").unlink(missing_ok=True)
    if in_both:
        (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    fields = json.loads((teacher / "config.json").read_text())
    fields["text_config"]["eos_token_id"] = named
    (teacher / "config.json").write_text(json.dumps(fields))
    end = EOS if named == BOS else named
    samples = Samples([RECORD], load_processor(teacher), load_hf(teacher)[0])
    assert samples.end_tokens == (end, PAD)
    assert samples.rows.tokens(0)["answer"][-1] == end

    cut(teacher, {"vision/mlp": 16}, tmp_path / "out", records=None)
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    for part in (model, model.language_model):
        assert part.generation_config.eos_token_id == ([end, named] if in_both else end)


def test_copies_of_the_text_fields_at_the_top_of_a_config_follow_them(tmp_path):
    """Some releases of transformers write the fields of `text_config` twice; tools read the sizes at the top."""
    teacher = save_llava(tmp_path / "teacher")
    fields = json.loads((teacher / "config.json").read_text())
    text = fields["text_config"]
    copies = {name: text[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    (teacher / "config.json").write_text(json.dumps({**fields, **copies, "mine": 3}))
    cut(teacher, {"text/layers": 2, "text/embed": 16}, tmp_path / "out", records=None)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written[name] for name in copies} == {name: written["text_config"][name] for name in copies}
    assert (written["hidden_size"], written["num_hidden_layers"], written["mine"]) == (16, 2, 3)
