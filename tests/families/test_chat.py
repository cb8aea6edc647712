"""Conversations: token ids equal the processor's for the whole text, and only answers are trained on."""

import numpy as np
import pytest
from transformers import AutoProcessor

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import new_processor
from data.chat import messages
from data.encoding import Encoder
from data.record import Record, Turn
from tests.families.cases import tokenizer
from tests.families.test_inputs import picture

TURNS = (
    Turn("system", ("new",)),
    Turn("user", (None, "what is the price ?")),
    Turn("assistant", ("$25.",)),
    Turn("user", ("what is", None, "the question: ?")),
    Turn("assistant", ("the price",)),
    Turn("user", ("what price ?",)),
    Turn("assistant", ("is new",)),
    # The same question again, about another picture.
    Turn("user", (None, "what is the price ?")),
    Turn("assistant", ("$25.",)),
    Turn("user", ("is the price new ?",)),
)
ANSWERS = ("$25.", "the price", "is new", "$25.", "new , $25.")
IMAGES = tuple(picture(*side) for side in ((50, 21), (16, 16), (19, 40)))


@pytest.fixture(scope="module")
def encoder(first, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    new_processor(first.config, tokenizer()).save_pretrained(folder)
    return Encoder(AutoProcessor.from_pretrained(folder), first.config, template="{question}")


def conversation(turns=TURNS, answer=ANSWERS[-1], images=IMAGES):
    return Record(images=images, question="", answer=answer, turns=turns, id="a")


def processed(encoder, turns, images):
    """The processor's ids of a whole conversation."""
    reads = encoder.inputs
    text = reads.processor.apply_chat_template(messages(turns), add_generation_prompt=False)
    return reads.processor(text=[text], images=[[*images]] if images else None, return_tensors="np")["input_ids"][0]


def multiturn(encoder):
    """Skips models without a chat template, which refuse conversations of several turns."""
    if encoder.inputs.processor.chat_template is None:
        with pytest.raises(AntgmmError, match="a: conversations of several turns need a chat template, and this model"):
            encoder(conversation())
        pytest.skip("no chat template")


def test_tokens_of_a_conversation_equal_the_processors(first, encoder):
    multiturn(encoder)
    row = encoder(conversation())
    expected = processed(encoder, (*TURNS, Turn("assistant", (ANSWERS[-1],))), IMAGES)
    whole = np.concatenate([row["prompt"], row["answer"]])
    np.testing.assert_array_equal(whole, expected[: len(whole)])
    # Text after the end token is not trained on.
    words = encoder.inputs.processor.tokenizer
    assert not words.decode(expected[len(whole) :], skip_special_tokens=True).strip()
    assert {row[name].dtype for name in ("prompt", "answer", "earlier")} == {np.dtype(np.int32)}


def test_trained_tokens_are_the_answers_with_their_end_tokens(first, encoder):
    multiturn(encoder)
    row, words = encoder(conversation()), encoder.inputs.processor.tokenizer
    runs = np.split(row["earlier"], np.flatnonzero(np.diff(row["earlier"]) > 1) + 1)
    trained = [*(row["prompt"][run] for run in runs), row["answer"]]
    assert [ids[-1] for ids in trained] == [encoder.eos] * 5
    assert [words.decode(ids[:-1]) for ids in trained] == [*ANSWERS]
    assert not (row["prompt"][row["earlier"]] == first.config.image_token).any()
    # Each answer begins where the prompt before it ends. The tokens of an image may depend on the images after it.
    token = first.config.image_token
    for place, run in zip((2, 4, 6, 8), runs, strict=True):
        images = IMAGES[: sum(part is None for turn in TURNS[:place] for part in turn.parts)]
        text = encoder.inputs.chat(messages(TURNS[:place]))
        before, _ = encoder.inputs(text, images)
        actual = row["prompt"][: run[0]]
        np.testing.assert_array_equal(actual[actual != token], before[before != token])


def test_a_question_with_its_answer_is_a_conversation_of_one_turn(first, encoder):
    """Its answer is tokenised separately."""
    words = encoder.inputs.processor.tokenizer
    row = encoder(Record(images=IMAGES[:2], question="what is the price ?", answer="new , $25."))
    chat = encoder(conversation((Turn("user", (None, None, "what is the price ?")),), images=IMAGES[:2]))
    assert {*row} == {*chat} and "earlier" not in row
    for made in (row, chat):
        expected = [*words("new , $25.", add_special_tokens=False)["input_ids"], words.eos_token_id]
        np.testing.assert_array_equal(made["answer"], expected)
        text = encoder.inputs.chat(messages([Turn("user", (None, None, "what is the price ?"))]))
        np.testing.assert_array_equal(made["prompt"], encoder.inputs(text, IMAGES[:2])[0])
    assert encoder.eos == words.eos_token_id


def test_text_without_pictures_and_pictures_without_text(first, encoder):
    multiturn(encoder)
    for turns, images in (
        ((Turn("user", ("what is new ?",)), Turn("assistant", ("the price",)), Turn("user", ("what ?",))), ()),
        ((Turn("user", (None,)), Turn("assistant", ("new",)), Turn("user", (None, None))), IMAGES),
    ):
        row = encoder(conversation(turns, "$25.", images))
        expected = processed(encoder, (*turns, Turn("assistant", ("$25.",))), images)
        whole = np.concatenate([row["prompt"], row["answer"]])
        np.testing.assert_array_equal(whole, expected[: len(whole)])
        assert len(row["earlier"]) == len(turns[1].text.split()) + 1


def test_a_turn_that_is_a_string_gives_the_tokens_of_its_parts(first, encoder):
    """Harnesses write `<image>` and a newline for every image, then the question."""
    multiturn(encoder)
    processor, line = encoder.inputs.processor, "what is the price ?"
    for images in ((), IMAGES[:1], IMAGES):
        turn = {"role": "user", "content": "<image>\n" * len(images) + line}
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
        options = {"images": [[*images]]} if images else {}
        ids = processor(text=[text], add_special_tokens=False, return_tensors="np", **options)["input_ids"][0]
        trained = encoder(conversation((Turn("user", (*[None] * len(images), line)),), images=images))["prompt"]
        np.testing.assert_array_equal(ids, trained)
