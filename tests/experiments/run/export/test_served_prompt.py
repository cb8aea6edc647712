"""The chat template of an export gives a server the token ids of training."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import new_processor
from antgmm_jax.families.common.words import BOS, CHAT, SPECIAL, UNK
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor, splits_as_file, stock_processor
from data.record import Record
from experiments.commands.models import _chat_line
from experiments.run.export.card import Origin
from experiments.run.export.completion import complete
from experiments.run.export.publishing import Questions, publish
from experiments.run.export.served_prompt import (
    TEMPLATE,
    conversations,
    first_difference,
    question_about_a_picture,
    served_ids,
    write_template,
)
from experiments.run.rows.random_batches import random_batch
from experiments.run.rows.samples import Samples
from tests.experiments.tiny import save_llava, save_smolvlm, save_teacher
from tests.reference import reloaded

WITHOUT_START = CHAT.removeprefix("{{ bos_token }}")


@pytest.fixture
def teacher(tmp_path):
    """A folder like those of LLaVA 1.5: the tokenizer adds the start token, the chat template does not write it."""
    directory = save_llava(tmp_path / "teacher")
    processor = AutoProcessor.from_pretrained(directory)
    start = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    processor.tokenizer.backend_tokenizer.post_processor = start
    processor.chat_template = WITHOUT_START
    processor.save_pretrained(directory)
    return directory


def samples_of(directory):
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    records = [Record(images=(image,) * count, question="what price?", answer="$5") for count in (1, 0, 2)]
    return Samples(records, load_processor(directory), load_hf(directory)[0])


def test_a_template_without_the_start_token_gets_it(teacher):
    samples = samples_of(teacher)
    chats = conversations(samples, 9)
    assert [len(chat.images) for chat in chats] == [1, 0, 2]
    assert {chat.ids[0] for chat in chats} == {BOS}
    served = served_ids(load_processor(teacher), chats[0].messages, chats[0].images)
    np.testing.assert_array_equal(served, chats[0].ids[1:])
    wrong = first_difference(teacher, chats)
    assert wrong.startswith(f"conversation 0: a server reads the token ids {served[:4].tolist()} at position 0")
    write_template(teacher)
    assert (teacher / TEMPLATE).read_text() == CHAT
    assert first_difference(teacher, chats) == ""
    write_template(teacher)
    assert (teacher / TEMPLATE).read_text() == CHAT


@pytest.mark.parametrize("height", [1, 3, 4])
def test_pictures_of_few_rows_are_served_as_they_are_read(teacher, height):
    write_template(teacher)
    image = np.random.default_rng(0).integers(0, 256, (height, 30, 3), np.uint8)
    samples = Samples(
        [Record(images=(image,), question="what price?", answer="$5")], load_processor(teacher), load_hf(teacher)[0]
    )
    assert first_difference(teacher, conversations(samples, 1)) == ""


def test_publishing_corrects_the_start_token_and_refuses_other_differences(teacher, tmp_path):
    config, params = load_hf(teacher)
    questions = Questions([random_batch(config, 2)], 2, 1, 0, conversations(samples_of(teacher), 3))
    settings = {"dtype": "float32", "prompt": "{question}", "origin": Origin("pruned", str(teacher))}
    publish(config, params, tmp_path / "good", teacher, questions=questions, **settings)
    assert (tmp_path / "good" / TEMPLATE).read_text() == CHAT
    (teacher / TEMPLATE).write_text(CHAT.replace("answer:", "reply:"))
    with pytest.raises(AntgmmError, match=r"bad was not written: .*conversation 0: a server reads the token ids \["):
        publish(config, params, tmp_path / "bad", teacher, questions=questions, **settings)
    assert not (tmp_path / "bad").exists()


def test_a_checkpoint_without_processor_or_template_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    write_template(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_question_about_a_picture_is_rendered_by_the_chat_template(teacher):
    shown = question_about_a_picture(teacher, load_hf(teacher)[0])
    text = "<image> question answer:"
    assert shown["template"] and shown["text"] == text
    tokenizer = load_processor(teacher).tokenizer
    assert shown["tokens"] == len(tokenizer(text)["input_ids"]) + 4 - 1  # the picture has four tokens


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
            "refuses the conversation: can only",
        ),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "reads texts where a conversation has lists of parts",
        ),
        (
            "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}",
            "writes 0 image tokens, 4 are needed",
        ),
        ("{{ raise_exception('no lists') }}", "no lists"),
    ],
)
def test_a_chat_template_that_holds_no_picture_is_refused(teacher, template, fault):
    processor = AutoProcessor.from_pretrained(teacher)
    processor.chat_template = template
    processor.save_pretrained(teacher)
    with pytest.raises(AntgmmError, match="cannot read a question about a picture: ") as error:
        question_about_a_picture(teacher, load_hf(teacher)[0])
    assert fault in str(error.value) and "\n" not in str(error.value)


def test_a_processor_without_a_chat_template_has_the_familys_form(teacher):
    processor = AutoProcessor.from_pretrained(teacher)
    processor.chat_template = None
    processor.save_pretrained(teacher)
    (teacher / TEMPLATE).unlink()
    shown = question_about_a_picture(teacher, load_hf(teacher)[0])
    assert not shown["template"] and shown["text"] == "USER: <image>\nquestion ASSISTANT:"


@pytest.mark.parametrize("save", [save_teacher, save_llava])
def test_without_a_chat_template_the_text_is_read_as_in_training(save, tmp_path):
    directory = save(tmp_path / "teacher")
    (directory / TEMPLATE).unlink(missing_ok=True)
    chats = conversations(samples_of(directory), 3)
    assert first_difference(directory, chats) == ""
    processor = AutoProcessor.from_pretrained(directory)
    start = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", UNK)])
    processor.tokenizer.backend_tokenizer.post_processor = start
    processor.save_pretrained(directory)
    wrong = first_difference(directory, chats)
    assert wrong.startswith("conversation 0: a server reads the token ids [")
    assert wrong.endswith("correct the teacher's tokenizer files")


def test_a_template_with_the_date_of_today_is_written_with_a_fixed_day(teacher):
    """A server would render the day of the request, training the day on which its rows were encoded."""
    (teacher / TEMPLATE).write_text("{{ bos_token }}{{ strftime_now('%Y-%m-%d') }} " + WITHOUT_START)
    chats = conversations(samples_of(teacher), 1)
    write_template(teacher)
    served = AutoProcessor.from_pretrained(teacher).apply_chat_template([*chats[0].messages])
    assert served.startswith("<s>2025-01-01 ")
    assert first_difference(teacher, chats) == ""


def test_a_template_that_only_the_tokenizer_holds_is_taken_if_it_writes_images(teacher):
    """Some conversions keep it in tokenizer_config.json, where servers find it and AutoProcessor does not."""
    (teacher / TEMPLATE).unlink()
    path = teacher / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"chat_template": CHAT}))
    assert AutoProcessor.from_pretrained(teacher).chat_template is None
    shown = question_about_a_picture(teacher, load_hf(teacher)[0])
    assert shown["template"] and shown["text"] == "<s><image> question answer:"
    write_template(teacher)  # as the code of the model card reads it
    assert AutoProcessor.from_pretrained(teacher).chat_template == CHAT
    (teacher / TEMPLATE).unlink()
    of_texts = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    path.write_text(json.dumps(settings | {"chat_template": of_texts}))
    shown = question_about_a_picture(teacher, load_hf(teacher)[0])
    assert not shown["template"] and shown["text"] == "USER: <image>\nquestion ASSISTANT:"
    assert shown["warning"].startswith("the tokenizer has a chat template that cannot write a picture, and it is not")
    assert shown["warning"] in _chat_line(shown)


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_a_template_in_an_older_place_gets_the_start_token(teacher, name):
    """transformers reads these files before chat_template.jinja; LLaVA 1.5 has its template in the first."""
    (teacher / TEMPLATE).unlink()
    path = teacher / name
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(fields | {"chat_template": WITHOUT_START}))
    assert AutoProcessor.from_pretrained(teacher).chat_template == WITHOUT_START
    chats = conversations(samples_of(teacher), 3)
    assert first_difference(teacher, chats)
    write_template(teacher)
    assert AutoProcessor.from_pretrained(teacher).chat_template == CHAT
    assert first_difference(teacher, chats) == ""
    assert not path.exists() or json.loads(path.read_text()) == fields


def test_a_tokenizer_splits_text_as_its_file_says_and_so_do_servers_of_an_export(tmp_path):
    """SmolVLM names GPT2Tokenizer, of which transformers 5 takes the vocabulary alone from tokenizer.json."""
    directory = save_smolvlm(tmp_path / "teacher")
    about = directory / "config.json"
    about.write_text(about.read_text().replace("smolvlm", "idefics3"))  # the model_type of the first SmolVLM
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lines = ["first\n\n1. second\n\n2. third"] * 9
    words.train_from_iterator(lines, trainers.BpeTrainer(special_tokens=[*SPECIAL], initial_alphabet=alphabet))
    config = load_hf(directory)[0]
    new_processor(config, words).save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    text, file = "first\n\n1. second", directory / "tokenizer.json"
    expected = Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids

    def ids(processor):
        return processor.tokenizer(text, add_special_tokens=False).input_ids

    assert ids(stock_processor(directory)) != expected == ids(load_processor(directory))
    repaired = stock_processor(directory)
    # As transformers marks a tokenizer of which it has replaced a rule that is known to be wrong.
    repaired.tokenizer.backend_tokenizer.fix_mistral_regex = True
    assert splits_as_file(repaired, file)
    assert not splits_as_file(stock_processor(directory), file)
    complete(directory, config)
    assert splits_as_file(stock_processor(directory), file)
    assert ids(stock_processor(directory)) == expected


def test_a_decoder_answers_a_padded_batch_as_each_of_its_rows(tmp_path):
    """A tokenizer that pads on the right, as transformers does by default, makes `generate` go on after padding."""
    directory = save_llava(tmp_path / "llava")
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "padding_side": "right"}))
    lines = ["<s> a", "<s> a pill for a better price"]

    def answers(texts):
        words = AutoProcessor.from_pretrained(directory).tokenizer
        inputs = words(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        tokens = reloaded(directory).generate(**inputs, max_new_tokens=4, do_sample=False)
        return tokens[:, inputs["input_ids"].shape[1] :].tolist()

    alone = [answers([line])[0] for line in lines]
    assert answers(lines) != alone
    complete(directory, load_hf(directory)[0])
    assert answers(lines) == alone
