"""Conversations as token ids: by hand, against transformers' assistant masks, and unsuitable templates."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import new_processor
from antgmm_jax.families.common.words import BOS, EOS, IMAGE, SPECIAL
from antgmm_jax.families.llava.presets import sized as llava
from antgmm_jax.pure import functional
from data import collate
from data.chat import messages
from data.encoding import Encoder, decode
from data.limits import BadRow
from data.making import batch
from data.packing import packed
from data.record import Record, Turn, images_first
from data.source import InMemorySource
from data.store import open_encoded
from distill.losses import hard
from experiments.run.rows import pairs

CONFIG = llava(
    vision=(1, 16, 1, 16), text=(1, 16, 1, 16), head_dims=(16, 16), image=16, patch=8, vocab=512, image_token=IMAGE
)
PICTURES = tuple(np.full((16, 16, 3), shade, np.uint8) for shade in (10, 200))
WORDS = ("answer:", "what", "red", "or", "green", "?")  # ids 5 to 10
ONE = (Turn("user", (None, "what ?")), Turn("assistant", ("red",)), Turn("user", ("or green ?",)))
TWO = (Turn("user", (None, "what?")), Turn("assistant", ("red or",)), Turn("user", ("or ", None, "?")))
TURN = "<|im_start|>{{ message['role'] }}\n"
CHATML = (
    f"{{% for message in messages %}}{TURN}{{% if message['role'] == 'assistant' %}}"
    "{% generation %}{{ message['content'][0]['text'] }}<|im_end|>{% endgeneration %}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An answer ends with a space only.
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def encoder(**about):
    """An encoder with a tokenizer of whole words and the template of new models."""
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate((*SPECIAL, *WORDS))}, "<unk>"))
    words.add_special_tokens([*SPECIAL])
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Encoder(new_processor(CONFIG, words), CONFIG, **about)


def bytewise(template):
    """An encoder with a byte-level tokenizer, which joins a space with the next word, as most checkpoints do."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [*SPECIAL, "<|im_start|>", "<|im_end|>"]
    lines = ["what is red or green? is it red: user assistant USER: ASSISTANT: red green"] * 9
    words.train_from_iterator(lines, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    processor = new_processor(CONFIG, words)
    processor.chat_template = template
    return Encoder(processor, CONFIG)


def record(turns=ONE, answer="green", **about):
    count = sum(part is None for turn in turns for part in turn.parts)
    return Record(images=PICTURES[:count], question="", answer=answer, turns=turns, id="a", **about)


def spelt(encode, ids):
    return [encode.inputs.processor.tokenizer.convert_ids_to_tokens(int(key)) for key in ids]


def whole_of(encode, turns, answer):
    """The processor's ids of a whole conversation."""
    processor = encode.inputs.processor
    text = processor.apply_chat_template(messages([*turns, Turn("assistant", (answer,))]))
    images = [*record(turns).images] or None
    return processor(text=[text], images=images, return_tensors="np")["input_ids"][0].tolist()


def test_ids_by_hand():
    row = encoder()(record())
    # <image> what ? answer: red </s> or green ? answer: -> green </s>
    np.testing.assert_array_equal(row["prompt"], [BOS, *[IMAGE] * 4, 6, 10, 5, 7, EOS, 8, 9, 10, 5])
    np.testing.assert_array_equal(row["answer"], [9, EOS])
    np.testing.assert_array_equal(row["earlier"], [8, 9])
    np.testing.assert_array_equal(row["images"]["pixels"], PICTURES[0][None])


def test_batches_by_hand(tmp_path):
    plain = Record(images=(), question="what ?", answer="red", id="b")
    rows = open_encoded(InMemorySource([record(), plain]), encoder(template="{question}"), tmp_path)
    layout = collate.Layout(False, 0, 0)
    needs = collate.needs(rows.index, False)
    assert [each.tolist() for each in needs] == [[16, 6], [4, 2], [1, 0]]
    made, no = batch(rows, np.arange(2), layout, needs.of(np.arange(2))), -100
    ids = [[BOS, *[IMAGE] * 4, 6, 10, 5, 7, EOS, 8, 9, 10, 5, 9, EOS], [BOS, 6, 10, 5, 7, EOS] + [0] * 10]
    np.testing.assert_array_equal(made["input_ids"], ids)
    np.testing.assert_array_equal(made["targets"], [[7, EOS, 9, EOS], [7, EOS, no, no]])
    np.testing.assert_array_equal(made["positions"], [[7, 8, 13, 14], [3, 4, 0, 0]])
    labels = np.full((2, 16), no)
    labels[0, [8, 9, 14, 15]], labels[1, [4, 5]] = (7, EOS, 9, EOS), (7, EOS)
    np.testing.assert_array_equal(made["labels"], labels)
    both = packed(rows, np.array([[1, 0]]), width=24, answer=4, slots=1)
    np.testing.assert_array_equal(both["input_ids"], [ids[1][:6] + ids[0] + [0, 0]])
    np.testing.assert_array_equal(both["targets"], [[7, EOS, no, no, 7, EOS, 9, EOS]])
    np.testing.assert_array_equal(both["positions"], [[3, 4, 0, 0, 13, 14, 19, 20]])
    # The last answer is generated after the given earlier ones.
    prompts = collate.prompts([rows.tokens(0)], layout, 14)
    np.testing.assert_array_equal(prompts["input_ids"], [ids[0][:14]])


@pytest.mark.long
def test_five_turns_are_one_row_with_the_loss_of_five_rows_and_a_fifth_of_the_pictures(tmp_path):
    lines = [("what ?", "red or"), ("or ?", "green"), ("red ?", "red"), ("green ?", "or"), ("what or ?", "green red")]
    turns = [turn for ask, answer in lines for turn in (Turn("user", (ask,)), Turn("assistant", (answer,)))]
    turns[0] = Turn("user", (None, "what ?"))
    each = [record(tuple(turns[: 2 * k + 1]), answer) for k, (_, answer) in enumerate(lines)]
    rows = open_encoded(InMemorySource([each[-1], *each]), encoder(), tmp_path)
    layout, need = collate.Layout(False, 0, 0), collate.needs(rows.index, False)
    one, five = np.arange(1), np.arange(1, 6)
    # The start token, four image tokens, and for each turn the question, `answer:`, the answer and the end token. The
    # five rows repeat what stands before their question.
    lengths = [5 + n for n in (6, 11, 16, 21, 28)]
    assert (need.text[one].tolist(), need.text[five].tolist()) == ([33], lengths)
    assert (need.slots[one].sum(), need.slots[five].sum()) == (1, 5)
    pure = functional(CONFIG)
    params = pure.init(jax.random.key(0))
    losses, tokens = [], []
    for chosen in (one, five):
        made = batch(rows, chosen, layout, need.of(chosen))
        # Of a row with a history, only the last answer is new.
        last = np.arange(made["targets"].shape[1]) >= rows.index.earlier[chosen, None]
        targets = made["targets"] if len(chosen) == 1 else np.where(last, made["targets"], -100)
        logits = pure.apply(params, made)["logits"]
        logits = jnp.take_along_axis(logits, jnp.asarray(made["positions"])[..., None], axis=1)
        tokens.append(np.sort(targets[targets >= 0]).tolist())
        losses.append(np.sum(np.where(targets >= 0, hard(logits, jnp.asarray(targets)), 0)))
    assert tokens[0] == tokens[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_trained_tokens_equal_the_templates_assistant_mask():
    encode, shown = bytewise(CHATML), iter(PICTURES)
    turns = [*messages([*TWO, Turn("assistant", ("green: it is",))])]
    for part in (part for turn in turns for part in turn["content"] if part["type"] == "image"):
        part["image"] = Image.fromarray(next(shown))
    about = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    theirs = encode.inputs.processor.apply_chat_template(turns, **about)
    row = encode(record(TWO, "green: it is"))
    trained = np.zeros(len(row["prompt"]) + len(row["answer"]), int)
    trained[collate.trained_tokens(row)] = 1
    np.testing.assert_array_equal(np.concatenate([row["prompt"], row["answer"]]), theirs["input_ids"][0])
    np.testing.assert_array_equal(trained, theirs["assistant_masks"][0])
    assert spelt(encode, row["prompt"][row["earlier"]]) == ["re", "d", "Ġor", "<|im_end|>"]
    assert spelt(encode, [encode.eos]) == ["<|im_end|>"]


def test_the_last_answer_gets_the_end_token_if_the_template_writes_none():
    encode = bytewise(VICUNA)
    row = encode(record(TWO, "green"))
    assert spelt(encode, row["prompt"][row["earlier"]]) == ["Ġred", "Ġor"]
    assert spelt(encode, row["answer"]) == ["Ġgreen", "</s>"]
    whole = whole_of(encode, TWO, "green")
    assert [*row["prompt"], *row["answer"][:-1]] == whole[:-1] and spelt(encode, whole[-1:]) == ["Ġ"]


def test_an_answer_after_a_space_in_the_prompt_is_tokenised_separately():
    """A server gives the model a prompt that ends with a space, and the model continues it."""
    encode = bytewise(VICUNA.replace("ASSISTANT:{%", "ASSISTANT: {%"))
    row = encode(record(TWO, "green"))
    assert spelt(encode, row["prompt"][-2:]) == [":", "Ġ"]
    assert spelt(encode, row["answer"]) == ["gre", "en", "</s>"]
    # In an earlier turn the token that joins space and word begins in the prompt.
    assert spelt(encode, row["prompt"][row["earlier"]]) == ["Ġor"]


def test_repeated_answers_are_located_after_their_own_question():
    turns = (Turn("user", (None, "what?")), Turn("assistant", ("red",)), Turn("user", (None, "what?")))
    encode = bytewise(CHATML)
    row = encode(record(turns, "red"))
    before, _ = encode.inputs(encode.inputs.chat(messages(turns[:1])), PICTURES[:1])
    assert row["earlier"][0] == len(before)
    whole = whole_of(encode, turns, "red")
    assert [*row["prompt"], *row["answer"]] == whole[: len(row["prompt"]) + len(row["answer"])]


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (
            CHATML.replace(TURN, "<|im_start|>{{ message['role'] }}!\n"),
            AntgmmError,
            r"a: the chat template ends a prompt with '\\n' but writes '!\\n' before an answer: correct chat_template",
        ),
        (
            CHATML.replace("['text'] }}<|im_end|>{% endg", "['text'].upper() }}<|im_end|>{% endg", 1).replace(
                "{{ message['content'][0]", "{{ 'answer' if loop.index == 2 and loop.last else message['content'][0]"
            ),
            BadRow,
            "does not write the answer 'red' where the prompt before it ends",
        ),
        (CHATML.replace("<image>", ""), BadRow, "the chat template writes 0 image tokens, 4 are needed"),
        (CHATML.replace("{{ part['text'] }}", "<image>{{ part['text'] }}"), BadRow, "writes 12 image tokens, 4 are"),
        (
            CHATML.replace(
                "{% for m", "{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}{% for m"
            ),
            BadRow,
            "the chat template refuses the conversation: one turn",
        ),
    ],
)
def test_unsuitable_templates_are_refused_by_name(template, error, message):
    with pytest.raises(error, match=message):
        bytewise(template)(record())


def test_records_in_memory_that_a_template_refuses_are_listed(tmp_path):
    records = InMemorySource([record(), replace(record(ONE[2:]), id=""), record()])
    with pytest.raises(AntgmmError) as refused:
        open_encoded(records, bytewise(CHATML.replace("<image>", "")), tmp_path)
    reason = "the chat template writes 0 image tokens, 4 are needed"
    assert str(refused.value) == f"2 of 3 records are invalid\na: {reason}\na: {reason}"


def test_templates_without_answers_are_refused_and_others_serve_one_turn():
    for template, message in (
        (CHATML.replace("{{ message['content'][0]['text'] }}", ""), "the chat template leaves out answers"),
        ("{{ raise_exception('no') }}", "the chat template refuses the conversation: no"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "reads texts where a conversation has lists of"),
    ):
        with pytest.raises(AntgmmError, match=message):
            bytewise(template)
    encode = bytewise(CHATML.replace(TURN, "<|im_start|>{{ message['role'] }}!\n"))
    for before in ((), (Turn("system", ("what ?",)),)):  # a system prompt is no earlier answer
        row = encode(record((*before, *ONE[:1]), "red"))
        assert spelt(encode, row["answer"]) == ["re", "d", "<|im_end|>"] and "earlier" not in row


def test_other_white_space_before_earlier_answers_is_read():
    """LLaVA-OneVision ends a prompt with a line break, and writes a space before it where an answer follows."""
    encode, plain = bytewise(CHATML.replace(TURN, "<|im_start|>{{ message['role'] }} \n")), bytewise(CHATML)
    row, usual = encode(record()), plain(record())
    assert spelt(encode, row["prompt"][row["earlier"]]) == spelt(plain, usual["prompt"][usual["earlier"]])
    assert spelt(encode, row["answer"]) == spelt(plain, usual["answer"])


def test_turns_with_special_tokens_and_long_answers_are_named():
    encode = encoder(max_answer=2)
    named = record((*ONE[:1], Turn("assistant", ("<image>",)), *ONE[2:]), "see <image>")
    assert encode.special_parts(named) == [("turn 2 (assistant)", "<image>"), ("answer", "<image>")]
    long = encode(record((*ONE[:1], Turn("assistant", ("red or green",)), *ONE[2:])))
    assert [(part.part, part.tokens, part.limit) for part in encode.too_long(long)] == [("answer", 4, 2)]
    assert encode.too_long(encode(record())) == []


def test_rows_longer_than_the_learned_positions_are_named():
    """Image tokens have positions too, and `max_length` does not count them."""
    plain = encoder()
    row = plain(record())
    length = len(row["prompt"]) + len(row["answer"])
    for limit, named in ((length, []), (length - 1, [("prompt with images and answer", length, length - 1, "")])):
        config = replace(CONFIG, language=replace(CONFIG.language, learned_positions=limit))
        limited = Encoder(plain.inputs.processor, config)
        assert [tuple(part) for part in limited.too_long(row)] == named
        assert limited.digest() != plain.digest()  # rows of a cache are not checked again


@pytest.mark.parametrize("turns", [(*ONE[:1], Turn("assistant", ("a blue one",)), *ONE[2:]), ONE])
def test_an_answer_that_becomes_the_unknown_token_is_refused(turns):
    encode, last = encoder(), "green" if turns != ONE else "blue"
    assert "blue" not in spelt(encode, range(len(encode.inputs.processor.tokenizer)))
    with pytest.raises(BadRow, match=f"has no tokens for all of the answer '{last}': write it in characters that it"):
        encode(record(turns, last))
    # In a question it is no error.
    assert spelt(encode, encode(record((Turn("user", ("what blue",)),), "red"))["answer"]) == ["red", "</s>"]


def test_an_end_token_that_is_also_the_unknown_token_is_no_error():
    encode = bytewise(VICUNA)
    encode.inputs.processor.tokenizer.unk_token = "</s>"
    assert spelt(encode, encode(record(TWO, "green"))["answer"]) == ["Ġgreen", "</s>"]


def test_pairs_have_the_pictures_of_another_row_before_the_first_question():
    other = replace(record((Turn("user", (None, None, "what ?")),), "red"), id="b")
    alone = replace(record((Turn("user", ("what ?",)),), "red"), id="c")
    source = pairs.paired(InMemorySource([record(), other, alone]), 3)
    encode = encoder()
    for made in source:
        asks, shows = made.id.split(" on ")
        assert asks != shows and len(made.images) == {"a": 1, "b": 2, "c": 0}[shows]
        turns = ONE if asks == "a" else other.turns
        expected = [turn.text for turn in turns if turn.role == "system" or turn is turns[-1]]
        assert [turn.text for turn in made.turns] == expected
        assert (encode(made)["prompt"] == IMAGE).sum() == 4 * len(made.images)
    (answered,) = pairs.Answered(source, [0], ["or"])
    assert encode(answered)["answer"].tolist() == [8, EOS]


def test_images_first_moves_pictures_to_the_first_question():
    turns = (
        Turn("system", ("s",)),
        Turn("user", ("a", None, "b")),
        Turn("assistant", ("c",)),
        Turn("user", (None, "d")),
    )
    assert images_first(turns, 1) == (
        Turn("system", ("s",)),
        Turn("user", (None, "a", "b")),
        Turn("assistant", ("c",)),
        Turn("user", ("d",)),
    )


def test_an_answer_behind_a_plain_prompt_begins_with_a_space_where_tokens_of_words_do():
    """OPT writes " red" after "Answer:", and "red" is another token."""
    encode = bytewise(None)
    row = encode(Record(images=PICTURES[:1], question="what?", answer="red", id="a"))
    assert spelt(encode, row["answer"]) == ["\u0120red", "</s>"]
    assert spelt(encoder(), encoder()(record())["answer"])[0] == "green"


def test_without_a_template_pictures_come_first_wherever_they_are():
    encode = bytewise(None)
    expected = encode(record((Turn("user", (None, "what?\nred")),)))["prompt"]
    for parts in ((None, "what?", "red"), ("what?", None, "red"), ("what?", "red", None)):
        np.testing.assert_array_equal(encode(record((Turn("user", parts),)))["prompt"], expected)
    for turns in (ONE, (Turn("system", ("what?",)), Turn("user", (None, "red")))):
        with pytest.raises((AntgmmError, BadRow), match="chat template"):
            encode(record(turns))


def test_an_end_token_that_is_a_line_break_ends_answers_and_its_letter_is_no_special_token():
    """BLIP-2 with OPT ends answers so; its tokenizer writes the token as a letter."""
    processor = bytewise(None).inputs.processor
    processor.tokenizer.eos_token = "\u010a"
    encode = Encoder(processor, CONFIG)
    question = Record(images=PICTURES[:1], question="is \u010a\nred?", answer="red", id="a")
    assert encode.special_parts(question) == []
    assert encode.special_parts(replace(question, answer="</s>")) == [("answer", "</s>")]
    assert spelt(encode, encode(question)["answer"])[-1] == "\u010a"
    with pytest.raises(BadRow, match=r"the answer 'red\\nor' contains '\\n', with which the model ends answers: write"):
        encode(replace(question, answer="red\nor"))


def test_words_that_a_template_writes_before_an_answer_are_trained_on_but_no_part_of_it():
    thinking = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}").replace(
        "{% generation %}", "{% if loop.last %}<think></think>{% endif %}{% generation %}"
    )
    encode = bytewise(thinking)
    row = encode(Record(images=PICTURES[:1], question="what?", answer="red", id="a"))
    tokens = row["answer"][None]
    processor = encode.inputs.processor
    assert encode.opening == "</think>"
    assert decode(processor, tokens) == ["</think>red"]
    assert decode(processor, tokens, encode.opening) == ["red"]
