"""Encoded pixels and ids equal the Hugging Face processor's; arrays have the layout that the loss expects."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoProcessor,
    BlipImageProcessor,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    LlavaProcessor,
    SiglipImageProcessor,
)

import data.maad as maad
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import inputs, new_processor
from antgmm_jax.families.blip2.presets import sized as blip2_t5
from antgmm_jax.families.common.square import SquarePictures
from antgmm_jax.families.common.words import BOS, EOS, IMAGE, PAD, user_turn, wrap
from antgmm_jax.families.llava.presets import sized as llava
from antgmm_jax.presets import preset
from data import collate
from data.encoding import Encoder, decode
from data.maad.answers import answer
from data.maad.latents import draw
from data.maad.tiers import brands
from data.making import batch
from data.record import Record, check_template, prompt
from data.source import InMemorySource
from data.store import open_encoded
from data.tokenizer import HUNDREDS, TENS, corpus, train_tokenizer

FAMILIES = ("blip2", "llava")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus("s", 1500), min_frequency=20)


def sizes(family, px=96):
    """A model whose pictures take 5 (BLIP-2) or 16 (LLaVA) tokens."""
    about = {"image": px, "patch": px // 4, "vocab": 1024, "image_token": IMAGE}
    if family == "llava":
        return llava(vision=(1, 16, 1, 16), text=(1, 16, 1, 16), head_dims=(16, 16), **about)
    towers = {"vision": (1, 16, 1, 16), "bridge": (2, 16, 1, 16), "text": (1, 1, 16, 1, 16)}
    return blip2_t5(**towers, head_dims=(16, 16, 16), queries=5, **about)


TOKENS = {"blip2": 5, "llava": 16}


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """Both processors, saved and loaded with `AutoProcessor`."""
    out = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        new_processor(sizes(name), tokenizer).save_pretrained(folder)
        out[name] = AutoProcessor.from_pretrained(folder)
    return out


@pytest.fixture
def encode(saved, tmp_path):
    """A function that encodes records as one batch, including their prompts without answers."""

    def made(family, records, **about):
        encoder = Encoder(saved[family], sizes(family), **about)
        rows = open_encoded(InMemorySource(records), encoder, tmp_path / "cache")
        form = collate.layout(encoder, 0)
        needs, order = collate.needs(rows.index, form.apart), np.arange(len(rows))
        shape = collate.widths(needs, form.apart).holds(needs.of(order))
        return batch(rows, order, form, shape, prompt=collate.bucket(int(rows.index.prompt.max())))

    return made


@pytest.fixture(scope="module")
def records():
    return [*maad.source("s", "val", 24)]


def odd_records(records):
    """Records with pictures that the processor must resize or crop."""
    shapes = ((50, 70), (96, 150), (200, 96), (131, 131))
    resized = [np.array(Image.fromarray(r.images[0]).resize(wh)) for r, wh in zip(records, shapes, strict=False)]
    return [Record(images=(image,), question="what is it?", answer="a", id=str(k)) for k, image in enumerate(resized)]


def normalised(images):
    """Normalised pixels [K, C, H, W] of the slots that hold a picture."""
    pixels = images["pixels"] * images["scale"][:, :, None, None] + images["offset"][:, :, None, None]
    return np.moveaxis(pixels[images["valid"]], -1, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_equal_the_processors(saved, encode, records, family):
    processor = saved[family]
    for group in (records[:6], odd_records(records)):
        images = encode(family, group)["images"]
        theirs = [processor.image_processor(r.images[0], return_tensors="np")["pixel_values"][0] for r in group]
        assert images["pixels"].dtype == np.uint8 and images["valid"].shape == (len(group), 1)
        np.testing.assert_allclose(normalised(images), np.stack(theirs), atol=1e-6, rtol=0)
        given = inputs(sizes(family), processor).torch({"images": images}, None)
        np.testing.assert_allclose(given["pixel_values"], np.stack(theirs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_ids_equal_the_processors(saved, encode, records, family):
    processor, reads = saved[family], inputs(sizes(family), saved[family])
    arrays = encode(family, records)
    for row, record in enumerate(records):
        line = reads.chat(user_turn(prompt(record.question, record.text), 1))
        theirs = processor(images=record.images[0], text=[line], return_tensors="np")
        np.testing.assert_array_equal(
            arrays["prompt/input_ids"][row][arrays["prompt/attention_mask"][row] == 1], theirs["input_ids"][0]
        )
        assert (theirs["input_ids"] == IMAGE).sum() == TOKENS[family]
    assert arrays["prompt/input_ids"].shape[1] % 8 == 0
    last = arrays["prompt/attention_mask"][:, -1]
    assert last.all() if family == "llava" else arrays["prompt/attention_mask"][:, 0].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_several_pictures_or_none_equal_the_processors_output(saved, encode, records, family):
    processor, reads = saved[family], inputs(sizes(family), saved[family])
    pictures = [record.images[0] for record in (*records[:2], *odd_records(records))]
    rows = [replace(records[k], images=tuple(pictures[:count])) for k, count in enumerate((3, 0, 1, 2))]
    arrays = encode(family, rows)
    images = arrays["images"]
    np.testing.assert_array_equal(images["valid"].sum(axis=1), [3, 0, 1, 2])
    assert (images["valid"][:, :-1] >= images["valid"][:, 1:]).all() and images["pixels"].shape[:2] == (4, 3)
    assert not images["pixels"][~images["valid"]].any()
    at = 0
    for row, record in enumerate(rows):
        line = reads.chat(user_turn(prompt(record.question, record.text), len(record.images)))
        shown = [*record.images] or None
        ids = arrays["prompt/input_ids"][row][arrays["prompt/attention_mask"][row] == 1]
        if family == "llava":
            np.testing.assert_array_equal(
                ids, processor(images=shown, text=[line], return_tensors="np")["input_ids"][0]
            )
        else:  # the processor counts one picture per text; each further picture takes as many tokens
            words = processor.tokenizer(line)["input_ids"]
            np.testing.assert_array_equal(ids, [IMAGE] * 5 * len(record.images) + words)
        if shown:
            theirs = processor.image_processor(shown, return_tensors="np")["pixel_values"]
            actual = normalised(images)[at : at + len(shown)]
            np.testing.assert_allclose(actual, np.stack(theirs), atol=1e-6, rtol=0)
        at += len(record.images)


def test_t5_arrays(saved, encode, records):
    arrays = encode("blip2", records)
    targets, decoded = arrays["targets"], arrays["decoder_input_ids"]
    np.testing.assert_array_equal(arrays["labels"], targets)
    for row, record in enumerate(records):
        length = (targets[row] != -100).sum()
        ids = targets[row, :length]
        assert ids[-1] == EOS
        assert (targets[row, length:] == -100).all()
        assert saved["blip2"].tokenizer.decode(ids[:-1]) == record.answer
        np.testing.assert_array_equal(decoded[row, :length], [0, *ids[:-1]])
        assert (decoded[row, length:] == PAD).all()
        np.testing.assert_array_equal(arrays["positions"][row], np.arange(targets.shape[1]))
        real = arrays["input_ids"][row][arrays["attention_mask"][row] == 1]
        assert real[-1] == EOS
        assert (real[:5] == IMAGE).all()
        assert PAD not in real


def test_llava_arrays(encode, records):
    arrays = encode("llava", records)
    for row in range(len(records)):
        ids, targets, places = arrays["input_ids"][row], arrays["targets"][row], arrays["positions"][row]
        real = targets != -100
        # The state at a position predicts the next token.
        np.testing.assert_array_equal(ids[places[real] + 1], targets[real])
        before = arrays["prompt/input_ids"][row][arrays["prompt/attention_mask"][row] == 1]
        assert before[0] == BOS
        np.testing.assert_array_equal(ids[: len(before)], before)
        assert places[0] == len(before) - 1
        expected = np.full(len(ids), -100)
        expected[places[real] + 1] = targets[real]
        np.testing.assert_array_equal(arrays["labels"][row], expected)
        assert arrays["attention_mask"][row].sum() == len(before) + real.sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_decoded_targets_are_the_answers(saved, encode, records, family):
    targets = encode(family, records)["targets"]
    assert decode(saved[family], np.where(targets == -100, PAD, targets)) == [r.answer for r in records]


def test_token_ids_are_int32(encode, records):
    arrays = encode("blip2", records[:3])
    assert arrays["images"]["pixels"].shape == (3, 1, 96, 96, 3)
    assert {value.dtype for name, value in arrays.items() if name != "images"} == {np.dtype(np.int32)}


@pytest.mark.parametrize(("tier", "limit"), [("s", 32), ("m", 48)])
def test_answers_of_every_tier_are_short(tier, limit):
    fast, preset = wrap(train_tokenizer(corpus(tier)), template="$A </s>"), maad.tier(tier)
    answers = [answer(preset, draw(preset, split, k)) for k in range(1200) for split in ("train", "test_hard")]
    ids = fast(answers)["input_ids"]
    assert max(map(len, ids)) <= limit
    assert not any(fast.unk_token_id in row for row in ids)


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1), min_size=1))
def test_any_ascii_line_survives_tokenization(tokenizer, words):
    line = " ".join(words)
    fast = wrap(tokenizer, template="$A </s>")
    ids = fast(line, add_special_tokens=False)["input_ids"]
    if not any(token in line for token in ("<pad>", "</s>", "<unk>", "<image>", "<s>")):
        assert fast.decode(ids) == line
        digits = [fast.convert_ids_to_tokens(i) for i in ids if any(c.isdigit() for c in fast.convert_ids_to_tokens(i))]
        assert all(len(token) == 1 for token in digits)


def test_digits_have_tokens_by_place_value(tokenizer):
    fast = wrap(tokenizer, template="$A </s>")
    assert fast.tokenize("$411,35;6") == ["▁$", HUNDREDS[4], TENS[1], "1", ",", TENS[3], "5", ";", "6"]
    # Longer numbers mark their last three digits.
    assert fast.tokenize("20245") == ["▁", "2", "0", HUNDREDS[2], TENS[4], "5"]


def test_unseen_brands_are_spelt_with_seen_syllables():
    fast = wrap(train_tokenizer(corpus("m")), template="$A </s>")
    all_brands, seen = brands(maad.tier("m"))
    pieces = [set(fast(b.name, add_special_tokens=False)["input_ids"]) for b in all_brands]
    assert set().union(*pieces[seen:]) <= set().union(*pieces[:seen])
    assert all(len(p) >= 2 for p in pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_rows_that_are_too_long_are_listed(encode, records, family):
    alone = encode(family, records)["prompt/attention_mask"].sum(axis=1) - TOKENS[family]
    limit = sorted(alone)[2]
    with pytest.raises(AntgmmError) as caught:
        encode(family, records, max_length=limit)
    head, *lines = str(caught.value).split("\n")
    long = [(r.id, n) for r, n in zip(records, alone, strict=True) if n > limit]
    left = 'or leave them out (too_long = "drop" in the table of the data)'
    assert head == f"{len(long)} of 24 rows are too long; shorten or remove them, or raise max_length, {left}"
    assert lines == [f"{name}: prompt of {n} tokens, at most {limit}" for name, n in long]
    with pytest.raises(AntgmmError) as caught:
        encode(family, [replace(records[0], id=""), records[1]], max_length=1, max_answer=1)
    head, *lines = str(caught.value).split("\n")
    assert head == f"2 of 2 rows are too long; shorten or remove them, or raise max_length and max_answer, {left}"
    assert [line.split(" of ")[0] for line in lines] == [
        *("record 1: prompt", "record 1: answer", f"{records[1].id}: prompt", f"{records[1].id}: answer")
    ]


def test_a_llava_processor_without_chat_template_gets_the_classic_prompt(saved):
    processor = copy.deepcopy(saved["llava"])
    processor.chat_template = None
    reads = inputs(sizes("llava"), processor)
    assert reads.chat(user_turn("text: a question: b", 1)) == "USER: <image>\ntext: a question: b ASSISTANT:"
    assert reads.chat(user_turn("q", 0)) == "USER: q ASSISTANT:"
    assert reads.chat(user_turn("q", 2)) == "USER: <image>\n<image>\nq ASSISTANT:"


def test_a_template_is_filled_with_a_records_words():
    assert prompt("what?", "new, $25.") == "text: new, $25. question: what?"
    assert prompt("what?") == "question: what?"
    template = "[Read: {text}; then ]say [INST] {question} Answer:"
    assert prompt("what {a}?", "[b] {c}", template) == "Read: [b] {c}; then say [INST] what {a}? Answer:"
    assert prompt("what?", "", template) == "say [INST] what? Answer:"
    assert prompt("what?", "", "{{{question}}} {text}") == "{what?} "


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Answer:", "has no question: add {question}"),
        ("{question} {answer}", "contains {answer}: only {question} and {text} are allowed"),
        ("{question.__class__}", "contains {question.__class__}"),
        ("{question!r}", "contains {question}"),
        ("{question:>9}", "contains {question}"),
        ("{question", "is not a valid template .* write {{ and }} for braces"),
        ("{question} {}", "contains {}"),
    ],
)
def test_invalid_templates_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        check_template(template)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipes_prompt_reaches_the_processor(saved, encode, records, family):
    processor, template = saved[family], "Question: {question}[ ({text})] Answer:"
    some = [replace(records[0], question="what price?", text=""), replace(records[1], question="wine?", text="$25.")]
    lines = ["Question: what price? Answer:", "Question: wine? ($25.) Answer:"]
    if family == "llava":
        lines = [f"<s><image> {line} answer:" for line in lines]
    arrays = encode(family, some, template=template)
    for row, (record, line) in enumerate(zip(some, lines, strict=True)):
        theirs = processor(images=record.images[0], text=[line], return_tensors="np")["input_ids"][0]
        ids, mask = arrays["prompt/input_ids"][row], arrays["prompt/attention_mask"][row]
        np.testing.assert_array_equal(ids[mask == 1], theirs)
        np.testing.assert_array_equal(arrays["input_ids"][row][: len(theirs)], theirs)


def test_a_prompt_that_leaves_out_a_rows_text_or_names_the_picture_is_refused(encode, records):
    rows = [replace(records[0], text=""), replace(records[1], text="$25.")]
    with pytest.raises(AntgmmError, match="does not contain the text of rows"):
        encode("blip2", rows, template="{question}")
    encode("blip2", rows[:1], template="{question}")
    with pytest.raises(AntgmmError, match="contains <image>: remove it"):
        encode("llava", rows, template="<image> {question}[{text}]")


@pytest.mark.parametrize("family", FAMILIES)
def test_text_with_the_image_token_is_refused(encode, records, family):
    rows = [replace(records[0], id="a", text="see <image>"), records[1], replace(records[2], id="", answer="<image>")]
    expected = "rows contain special tokens of the tokenizer; remove them"
    expected += "\na: text contains <image>\nrecord 3: answer contains <image>"
    with pytest.raises(AntgmmError) as refused:
        encode(family, rows)
    assert str(refused.value) == expected


def test_a_processor_of_another_model_is_refused(saved, monkeypatch):
    config = preset("antgmm-tiny")
    with pytest.raises(AntgmmError, match="makes images of 96 pixels with 5 tokens, the model reads"):
        inputs(config, saved["blip2"])
    # The text would have no tokens for the image features.
    with pytest.raises(AntgmmError, match="image token is 3, the model's 7"):
        inputs(replace(config, image_token=7), saved["blip2"])
    small = replace(config, language=replace(config.language, vocab=64))
    with pytest.raises(AntgmmError, match=r"the tokenizer has \d+ tokens, the model 64"):
        inputs(small, saved["blip2"])
    for family, field in (("blip2", "num_query_tokens"), ("llava", "patch_size")):
        with monkeypatch.context() as patch:
            patch.setattr(saved[family], field, None)
            with pytest.raises(AntgmmError, match=rf"the processor has no {field} \(older releases"):
                inputs(sizes(family), saved[family])
    old = copy.deepcopy(saved["llava"])
    old.num_additional_image_tokens = 0  # the default of transformers, for files that do not name it
    named = r'num_additional_image_tokens = 1, vision_feature_select_strategy = "default" in processor_config\.json'
    with pytest.raises(AntgmmError, match=rf"set patch_size = \d+, {named} .*, or save the model's own processor"):
        inputs(sizes("llava"), old)
    unpadded = copy.deepcopy(saved["llava"])
    unpadded.tokenizer.pad_token = None
    with pytest.raises(AntgmmError, match="the tokenizer has no padding token"):
        inputs(sizes("llava"), unpadded)
    for family, other in (("blip2", "llava"), ("llava", "blip2")):
        with pytest.raises(AntgmmError, match="the model has a .* but needs a .*Processor"):
            inputs(sizes(family), saved[other])


IMAGES = {
    "shortest side, then crop": CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 40, "width": 40}),
    "crop of a square": CLIPImageProcessor(size={"height": 48, "width": 48}, crop_size={"height": 40, "width": 40}),
    "crop without resizing": CLIPImageProcessor(do_resize=False, crop_size={"height": 40, "width": 40}),
    "bilinear": SiglipImageProcessor(size={"height": 40, "width": 40}, resample=Image.Resampling.BILINEAR),
    "bicubic": BlipImageProcessor(size={"height": 40, "width": 40}),
    "pan and scan": Gemma3ImageProcessor(size={"height": 40, "width": 40}, do_pan_and_scan=False),
}


@pytest.mark.parametrize("case", IMAGES)
def test_the_steps_of_a_processor_give_the_pixels_of_the_whole(tokenizer, case):
    images = IMAGES[case]
    made = LlavaProcessor(images, new_processor(sizes("llava"), tokenizer).tokenizer)
    pixels, last = SquarePictures(made), {"input_data_format": "channels_last"}
    rng = np.random.default_rng(0)
    for shape in ((504, 672), (40, 40), (41, 30), (300, 7), (1, 1)):
        image = rng.integers(0, 256, (*shape, 3), np.uint8)
        image.flags.writeable = False
        whole = images(image.copy(), do_rescale=False, do_normalize=False, return_tensors="np", **last)["pixel_values"]
        np.testing.assert_array_equal(np.moveaxis(pixels([image])["pixels"], -1, 1), whole)


def test_a_picture_of_the_models_size_is_resized_like_others(tokenizer):
    made = new_processor(sizes("llava", 24), tokenizer)
    made.image_processor.size = {"shortest_edge": 32}
    image = (np.arange(24 * 24 * 3) % 251).astype(np.uint8).reshape(24, 24, 3)
    expected = made.image_processor(image, return_tensors="np")["pixel_values"]
    _, tree = inputs(sizes("llava", 24), made)("<image>q", [image])
    normalised_tree = tree["pixels"] * tree["scale"][:, None, None] + tree["offset"][:, None, None]
    np.testing.assert_allclose(np.moveaxis(normalised_tree, -1, 1), np.asarray(expected), atol=1e-6, rtol=0)
