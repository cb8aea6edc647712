"""Processors against Hugging Face's own output; arrays against the contract of the loss."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

import data.maad as maad
from antgmm_jax.errors import AntgmmError
from antgmm_jax.pictures import as_hf
from antgmm_jax.presets import preset
from data.encoding import decode, encode, encode_prompts, prompts
from data.maad.answers import answer
from data.maad.latents import draw
from data.maad.tier import brands
from data.processor import (
    blip2_processor,
    check_fit,
    device_batch,
    image_tokens,
    llava_processor,
    pictures,
    pixel_table,
    prepare,
)
from data.record import Record, check_template, prompt
from data.tokenizer import BOS, EOS, HUNDREDS, IMAGE, PAD, TENS, corpus, train_tokenizer, wrap

FAMILIES = ("blip2", "llava")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus("s", 1500), min_frequency=20)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """Both processors, saved and read back as a user would."""
    made = {
        "blip2": blip2_processor(tokenizer, px=96, queries=5),
        "llava": llava_processor(tokenizer, px=96, patch=24),
    }
    out = {}
    for name, processor in made.items():
        folder = tmp_path_factory.mktemp(name)
        processor.save_pretrained(folder)
        out[name] = AutoProcessor.from_pretrained(folder)
    return out


@pytest.fixture(scope="module")
def records():
    return [*maad.source("s", "val", 24)]


def odd_records(records):
    """Pictures that the processor has to resize or crop."""
    shapes = ((50, 70), (96, 150), (200, 96), (131, 131))
    resized = [np.array(Image.fromarray(r.image).resize(wh)) for r, wh in zip(records, shapes, strict=False)]
    return [Record(image=image, question="what is it?", answer="a", id=str(k)) for k, image in enumerate(resized)]


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_the_processors_own(saved, records, family):
    processor = saved[family]
    for group in (records[:6], odd_records(records)):
        ours = as_hf(pictures(pixel_table(processor), prepare(processor, group).images))
        theirs = [processor.image_processor(r.image, return_tensors="np")["pixel_values"][0] for r in group]
        # value * scale + offset rounds twice where the processor rounds three times.
        np.testing.assert_allclose(ours, np.stack(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_ids_are_the_processors_own(saved, records, family):
    processor = saved[family]
    arrays = encode_prompts(processor, records)
    lines = prompts(processor, records)
    for row, (record, line) in enumerate(zip(records, lines, strict=True)):
        theirs = processor(images=record.image, text=[line], return_tensors="np")
        np.testing.assert_array_equal(
            arrays["input_ids"][row][arrays["attention_mask"][row] == 1], theirs["input_ids"][0]
        )
        assert (theirs["input_ids"] == IMAGE).sum() == image_tokens(processor)
    assert arrays["input_ids"].shape[1] % 8 == 0
    last = arrays["attention_mask"][:, -1]
    assert last.all() if family == "llava" else arrays["attention_mask"][:, 0].all()


def test_t5_arrays(saved, records):
    arrays = encode(saved["blip2"], records)
    targets, inputs = arrays["targets"], arrays["decoder_input_ids"]
    np.testing.assert_array_equal(arrays["labels"], targets)
    for row, record in enumerate(records):
        length = (targets[row] != -100).sum()
        ids = targets[row, :length]
        assert ids[-1] == EOS
        assert (targets[row, length:] == -100).all()
        assert saved["blip2"].tokenizer.decode(ids[:-1]) == record.answer
        np.testing.assert_array_equal(inputs[row, :length], [0, *ids[:-1]])
        assert (inputs[row, length:] == PAD).all()
        np.testing.assert_array_equal(arrays["positions"][row], np.arange(targets.shape[1]))
        real = arrays["input_ids"][row][arrays["attention_mask"][row] == 1]
        assert real[-1] == EOS
        assert (real[:5] == IMAGE).all()
        assert PAD not in real


def test_llava_arrays(saved, records):
    arrays, alone = encode(saved["llava"], records), encode_prompts(saved["llava"], records)
    for row in range(len(records)):
        ids, targets, places = arrays["input_ids"][row], arrays["targets"][row], arrays["positions"][row]
        real = targets != -100
        # The state at a position predicts the token after it.
        np.testing.assert_array_equal(ids[places[real] + 1], targets[real])
        before = alone["input_ids"][row][alone["attention_mask"][row] == 1]
        assert before[0] == BOS
        np.testing.assert_array_equal(ids[: len(before)], before)
        assert places[0] == len(before) - 1
        expected = np.full(len(ids), -100)
        expected[places[real] + 1] = targets[real]
        np.testing.assert_array_equal(arrays["labels"][row], expected)
        assert arrays["attention_mask"][row].sum() == len(before) + real.sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_come_back(saved, records, family):
    targets = encode(saved[family], records)["targets"]
    assert decode(saved[family], np.where(targets == -100, PAD, targets)) == [r.answer for r in records]


def test_device_batch_gives_pictures_as_a_tree(saved, records):
    arrays = encode(saved["blip2"], records[:3])
    batch = device_batch(pixel_table(saved["blip2"]), arrays)
    assert batch["images"]["pixels"].shape == (3, 1, 96, 96, 3)
    assert batch["images"]["pixels"].dtype == np.uint8
    assert set(batch) == set(arrays)
    assert {value.dtype for name, value in batch.items() if name != "images"} == {np.dtype(np.int32)}


@pytest.mark.parametrize(("tier", "limit"), [("s", 32), ("m", 48)])
def test_answers_of_every_tier_are_short(tier, limit):
    fast, preset = wrap(train_tokenizer(corpus(tier)), template="$A </s>"), maad.tier(tier)
    answers = [answer(preset, draw(preset, split, k)) for k in range(1200) for split in ("train", "test_hard")]
    ids = fast(answers)["input_ids"]
    assert max(map(len, ids)) <= limit
    assert not any(fast.unk_token_id in row for row in ids)


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1), min_size=1))
def test_any_ascii_line_is_spelt_exactly(tokenizer, words):
    line = " ".join(words)
    fast = wrap(tokenizer, template="$A </s>")
    ids = fast(line, add_special_tokens=False)["input_ids"]
    if not any(token in line for token in ("<pad>", "</s>", "<unk>", "<image>", "<s>")):
        assert fast.decode(ids) == line
        digits = [fast.convert_ids_to_tokens(i) for i in ids if any(c.isdigit() for c in fast.convert_ids_to_tokens(i))]
        assert all(len(token) == 1 for token in digits)


def test_digits_carry_their_place(tokenizer):
    fast = wrap(tokenizer, template="$A </s>")
    assert fast.tokenize("$411,35;6") == ["▁$", HUNDREDS[4], TENS[1], "1", ",", TENS[3], "5", ";", "6"]
    # Of longer numbers the last three.
    assert fast.tokenize("20245") == ["▁", "2", "0", HUNDREDS[2], TENS[4], "5"]


def test_unseen_brands_are_spelt_with_seen_syllables():
    fast = wrap(train_tokenizer(corpus("m")), template="$A </s>")
    found, seen = brands(maad.tier("m"))
    pieces = [set(fast(b.name, add_special_tokens=False)["input_ids"]) for b in found]
    assert set().union(*pieces[seen:]) <= set().union(*pieces[:seen])
    assert all(len(p) >= 2 for p in pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_are_too_long_are_all_named(saved, records, family):
    processor = saved[family]
    alone = [len(row) - image_tokens(processor) for row in _ids(processor, records)]
    limit = sorted(alone)[2]
    with pytest.raises(AntgmmError) as caught:
        encode_prompts(processor, records, max_length=limit)
    head, *lines = str(caught.value).split("\n")
    long = [(r.id, n) for r, n in zip(records, alone, strict=True) if n > limit]
    assert head == f"{len(long)} of 24 rows are too long; shorten or remove them, or raise max_length"
    assert lines == [f"{name}: prompt of {n} tokens, at most {limit}" for name, n in long]
    with pytest.raises(AntgmmError) as caught:
        encode(processor, [replace(records[0], id=""), records[1]], max_length=1, max_answer=1)
    head, *lines = str(caught.value).split("\n")
    assert head == "2 of 2 rows are too long; shorten or remove them, or raise max_length and max_answer"
    assert [line.split(" of ")[0] for line in lines] == [
        *("record 1: prompt", "record 1: answer", f"{records[1].id}: prompt", f"{records[1].id}: answer")
    ]


def _ids(processor, records):
    arrays = encode_prompts(processor, records)
    return [ids[mask == 1] for ids, mask in zip(arrays["input_ids"], arrays["attention_mask"], strict=True)]


def test_a_llava_processor_without_chat_template_gets_the_classic_prompt(saved, records):
    processor = saved["llava"]
    template, processor.chat_template = processor.chat_template, None
    try:
        assert prompts(processor, records[:1])[0].startswith("USER: <image>\ntext: ")
        assert prompts(processor, records[:1])[0].endswith(" ASSISTANT:")
    finally:
        processor.chat_template = template


def test_a_template_is_filled_with_a_records_words():
    assert prompt("what?", "new, $25.") == "text: new, $25. question: what?"
    assert prompt("what?") == "question: what?"
    own = "[Read: {text}; then ]say [INST] {question} Answer:"
    assert prompt("what {a}?", "[b] {c}", own) == "Read: [b] {c}; then say [INST] what {a}? Answer:"
    assert prompt("what?", "", own) == "say [INST] what? Answer:"
    assert prompt("what?", "", "{{{question}}} {text}") == "{what?} "


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Answer:", "asks no question: write {question} where it stands"),
        ("{question} {answer}", "names {answer}: only {question} and {text} are filled in"),
        ("{question.__class__}", "names {question.__class__}"),
        ("{question!r}", "names {question}"),
        ("{question:>9}", "names {question}"),
        ("{question", "is no template .* write {{ and }} for braces"),
        ("{question} {}", "names {}"),
    ],
)
def test_what_no_record_fills_is_no_template(template, message):
    with pytest.raises(ValueError, match=message):
        check_template(template)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipes_own_prompt_is_what_the_processor_is_given(saved, records, family):
    processor, own = saved[family], "Question: {question}[ ({text})] Answer:"
    some = [replace(records[0], question="what price?", text=""), replace(records[1], question="wine?", text="$25.")]
    lines = ["Question: what price? Answer:", "Question: wine? ($25.) Answer:"]
    if family == "llava":
        lines = [f"<image> {line} answer:" for line in lines]
    prompted, trained = encode_prompts(processor, some, template=own), encode(processor, some, template=own)
    for row, (record, line) in enumerate(zip(some, lines, strict=True)):
        theirs = processor(images=record.image, text=[line], return_tensors="np")["input_ids"][0]
        np.testing.assert_array_equal(prompted["input_ids"][row][prompted["attention_mask"][row] == 1], theirs)
        np.testing.assert_array_equal(trained["input_ids"][row][: len(theirs)], theirs)


def test_a_prompt_that_leaves_out_a_rows_text_or_names_the_picture_is_refused(saved, records):
    rows = [replace(records[0], text=""), replace(records[1], text="$25.")]
    with pytest.raises(AntgmmError, match="leaves out the text of rows"):
        encode(saved["blip2"], rows, template="{question}")
    encode(saved["blip2"], rows[:1], template="{question}")
    with pytest.raises(AntgmmError, match="names <image>: where the picture stands is the processor's to say"):
        encode_prompts(saved["llava"], rows, template="<image> {question}[{text}]")


@pytest.mark.parametrize("family", FAMILIES)
def test_words_that_hold_the_pictures_placeholder_are_refused(saved, records, family):
    rows = [replace(records[0], id="a", text="see <image>"), records[1], replace(records[2], id="", answer="<image>")]
    expected = "<image> stands for the picture; take it out of what rows say\na: text\nrecord 3: answer"
    with pytest.raises(AntgmmError) as refused:
        encode(saved[family], rows)
    assert str(refused.value) == expected


def test_a_processor_of_another_model_is_refused(saved, monkeypatch):
    config = preset("antgmm-tiny")
    with pytest.raises(AntgmmError, match="makes pictures of 96 pixels that take 5 tokens, the model reads"):
        check_fit(saved["blip2"], config)
    # Features would be put where no such token is: nowhere.
    with pytest.raises(AntgmmError, match="writes token 3 where the picture stands, the model looks for 7"):
        check_fit(saved["blip2"], replace(config, image_token=7))
    small = replace(config, language=replace(config.language, vocab=64))
    with pytest.raises(AntgmmError, match=r"the tokenizer has \d+ tokens, the model 64"):
        check_fit(saved["blip2"], small)
    for family, field in (("blip2", "num_query_tokens"), ("llava", "patch_size")):
        with monkeypatch.context() as patch:
            patch.setattr(saved[family], field, None)
            with pytest.raises(AntgmmError, match=f"the processor has no {field}, as those that older releases"):
                check_fit(saved[family], config)
    unpadded = copy.deepcopy(saved["llava"])
    unpadded.tokenizer.pad_token = None
    with pytest.raises(AntgmmError, match="the tokenizer has no token that pads"):
        check_fit(unpadded, config)


def test_a_picture_of_the_models_size_is_resized_where_others_are(tokenizer):
    made = llava_processor(tokenizer, px=24, patch=12)
    made.image_processor.size = {"shortest_edge": 32}
    image = (np.arange(24 * 24 * 3) % 251).astype(np.uint8).reshape(24, 24, 3)
    record = Record(image=image, question="q", answer="a")
    expected = made.image_processor(record.image, return_tensors="np")["pixel_values"]
    shown = as_hf(pictures(pixel_table(made), prepare(made, [record]).images))
    np.testing.assert_allclose(shown, np.asarray(expected), rtol=0, atol=1e-6)
