"""The server of exports: its answers are those of JAX in any batch, and a request that it refuses says why."""

import asyncio
import base64
import io
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client import CollectorRegistry

from antgmm_jax.decoding import generate
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.words import user_turn
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from data import maad
from data.encoding import decode
from data.limits import MOST_PIXELS
from data.writers import png
from experiments.lab.servers.under_load import equal, rows
from experiments.run.rows.samples import Samples
from experiments.run.scores.server import request_messages
from experiments.serving.batches import load, longest_prompt
from experiments.serving.requests import DEEPEST, check_options, conversation, most_tokens, shallow
from experiments.serving.server import CHAT, LARGEST, Answers, Metrics, application
from tests.experiments.tiny import save_llava, save_teacher

TOKENS = 4
RECORDS = [maad.source("s", "test", 5)[row] for row in range(5)]


def in_jax(directory):
    """Answers of a checkpoint to each record alone."""
    config, params = load_hf(directory)
    processor = load_processor(directory)
    samples = Samples(RECORDS, processor, config)
    (batch,) = samples.in_order(len(samples), prompts=True)
    prompt = {"images": batch["images"], **{n: batch[f"prompt/{n}"] for n in ("input_ids", "attention_mask")}}
    eos, pad = samples.end_tokens
    return decode(processor, np.asarray(generate(config, params, prompt, max_new_tokens=TOKENS, eos=eos, pad=pad)))


@pytest.mark.parametrize("save", [save_teacher, save_llava])
def test_answers_in_batches_are_those_of_jax(tmp_path, save):
    directory = save(tmp_path / "model")
    model = load(directory, max_new_tokens=TOKENS, most=3)
    read = [conversation({"messages": request_messages(record)}) for record in RECORDS]
    for (_, images), record in zip(read, RECORDS, strict=True):
        np.testing.assert_array_equal(images, record.images)
    questions = [model.question(*one) for one in read]
    assert [one.text for one in model.answers(questions)] == in_jax(directory)
    assert model.answers([]) == []


def test_an_answer_has_the_length_that_is_asked_for_and_says_whether_it_ended(tmp_path):
    model = load(save_llava(tmp_path / "model"), max_new_tokens=TOKENS, most=3)
    read, end, pad = conversation({"messages": request_messages(RECORDS[0])}), model.ends[0], model.pad
    word = model.processor.tokenizer("red").input_ids[-1]

    def of(row, most=None):
        fixed = model._replace(answer=lambda batch: np.array([row]))
        (answer,) = fixed.answers([fixed.question(*read, most)])
        return answer

    prompt = len(model.question(*read).ids)
    assert of([word, end, pad, pad]) == ("red", True, prompt, 2)
    assert of([word] * 4)[1:] == (False, prompt, 4)
    assert of([word, word, end, pad], 2)[:2] == of([word, word, pad, pad])[:2]
    assert of([word, word, end, pad], 2)[1] is False


def test_words_that_a_template_writes_before_answers_are_not_sent(tmp_path):
    model = load(save_llava(tmp_path / "model"), max_new_tokens=TOKENS, most=3)
    read = conversation({"messages": request_messages(RECORDS[0])})
    tokens = model.processor.tokenizer("red cross", add_special_tokens=False).input_ids[-TOKENS:]
    fixed = model._replace(answer=lambda batch: np.array([[*tokens, *[model.pad] * TOKENS][:TOKENS]]))
    whole = fixed.answers([fixed.question(*read)])[0].text
    fixed = fixed._replace(opening=whole[:2])
    assert fixed.answers([fixed.question(*read)])[0].text == whole[2:].strip() != whole


def test_a_server_says_that_it_does_not_use_the_gpu_and_why(tmp_path, monkeypatch, capsys):
    directory = save_llava(tmp_path / "model")
    load(directory, max_new_tokens=TOKENS, most=3)
    assert "GPU" not in "".join(capsys.readouterr())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**11))
    load(directory, max_new_tokens=TOKENS, most=3)
    line = "warning: the model runs on the CPU: on the GPU, it is loaded with 1.07 GB free, of which there are 1\n"
    assert line in "".join(capsys.readouterr())


def test_images_that_exceed_the_prompt_are_refused_one_by_one(tmp_path):
    model, read = load(save_llava(tmp_path / "model"), max_new_tokens=TOKENS, most=3), []

    class Counting:
        processor, chat = model.processor, model.reads.chat

        def __call__(self, text, images):
            read.append(len(images))
            return model.reads(text, images)

    image, each = (
        RECORDS[0].images[0],
        model.taken(model.reads(model.reads.chat(user_turn("", 1)), RECORDS[0].images)[1]),
    )
    small = model._replace(reads=Counting(), longest=10 * each)
    with pytest.raises(AntgmmError, match=f"the images take over {10 * each} tokens, more than are read: send fewer"):
        small.question([{"role": "user", "content": [{"type": "image"}] * 50}], [image] * 50)
    assert read == [2] * 11


def test_a_batch_that_the_model_cannot_answer_fails_alone(tmp_path, capsys):
    api = Answers(save_llava(tmp_path / "model"), "student", max_new_tokens=TOKENS, most=3, wait=0.0)
    api.setup("cpu")
    model = api._model
    short, long = ([{"role": "user", "content": [{"type": "text", "text": "a " * n}]}] for n in (1, 40))

    def answer(batch):
        if batch["input_ids"].shape[1] > 32:
            raise RuntimeError("no\nmemory")
        return np.full((len(batch["input_ids"]), TOKENS), model.pad)

    questions = [model.question(one, RECORDS[0].images[:0]) for one in (long, short)]
    failed, answered = model._replace(answer=answer).answers(questions)
    reply = api.encode_response(failed)
    error = {"message": "the model cannot answer the request: no memory", "type": "server_error"}
    assert (reply.status_code, json.loads(reply.body)["error"]) == (500, error)
    assert "the model failed on a request of width 48: no memory" in capsys.readouterr().err
    assert answered[:2] == ("", False)


def test_a_model_that_reads_images_only_refuses_a_conversation_without_one(tmp_path):
    text = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    model = load(save_teacher(tmp_path / "model"), max_new_tokens=TOKENS, most=3)
    with pytest.raises(AntgmmError, match="has no image, and the model answers about images only"):
        model.question(text, [])
    assert not load(save_llava(tmp_path / "llava"), max_new_tokens=TOKENS, most=3).pictured


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "other"}, "no other model than 'student'"),
        ({"stream": True}, "does not support 'stream'"),
        ({"n": 2}, "does not support 'n'"),
        ({"stop": ["a"]}, "does not support 'stop'"),
        ({"logit_bias": {"5": 1}}, "does not support 'logit_bias' with this value: leave it out"),
        ({"frequency_penalty": 0.5}, "does not support 'frequency_penalty'"),
        ({"presence_penalty": -2}, "does not support 'presence_penalty'"),
        ({"repetition_penalty": 1.1}, "does not support 'repetition_penalty'"),
        ({"repetition_penalty": 0}, "does not support 'repetition_penalty'"),
        ({"min_tokens": 3}, "does not support 'min_tokens'"),
        ({"stop_token_ids": [5]}, "does not support 'stop_token_ids'"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "does not support 'structured_outputs'"),
        ({"ignore_eos": True}, "does not support 'ignore_eos'"),
        ({"functions": [{"name": "f"}]}, "does not support 'functions'"),
        ({"model": "student", "stream": False, "n": 1, "tools": [], "temperature": 0.7, "stop": None}, ""),
        ({"logit_bias": {}, "frequency_penalty": 0.0, "presence_penalty": 0, "repetition_penalty": 1.0}, ""),
        ({"min_tokens": 0, "stop_token_ids": [], "functions": [], "logit_bias": None, "guided_json": {}}, ""),
    ],
)
def test_what_the_server_does_not_do_is_refused(fields, message):
    with pytest.raises(AntgmmError, match=message) if message else nullcontext():
        check_options(fields, "student")


@pytest.mark.parametrize(("fields", "most"), [({}, 9), ({"max_tokens": 4}, 4), ({"max_completion_tokens": 99}, 9)])
def test_the_length_of_an_answer_is_the_smaller_of_two(fields, most):
    assert most_tokens(fields, 9) == most


@pytest.mark.parametrize("wrong", [0, -1, "4", 2.0, True])
def test_a_length_that_is_no_number_is_refused(wrong):
    with pytest.raises(AntgmmError, match="max_tokens must be a number above 0"):
        most_tokens({"max_tokens": wrong}, 9)


def test_a_text_with_a_special_token_or_too_many_is_refused(tmp_path):
    model = load(save_llava(tmp_path / "model"), max_new_tokens=TOKENS, most=3)
    with pytest.raises(AntgmmError, match="a text contains </s>: remove it"):
        model.question([{"role": "user", "content": [{"type": "text", "text": "a </s> b"}]}], [])
    with pytest.raises(AntgmmError, match=r"has \d+ tokens, at most 2 are read"):
        model._replace(longest=2).question([{"role": "user", "content": [{"type": "text", "text": "a b"}]}], [])
    with pytest.raises(AntgmmError, match="has 129 characters, at most 2 tokens are read"):
        model._replace(longest=2).question([{"role": "user", "content": [{"type": "text", "text": "a" * 129}]}], [])
    # The image token of BLIP-2 is not among `all_special_tokens`.
    other = load(save_teacher(tmp_path / "other"), max_new_tokens=TOKENS, most=3)
    with pytest.raises(AntgmmError, match="a text contains <image>: remove it"):
        other.question(
            [{"role": "user", "content": [{"type": "text", "text": "<image>"}]}], [np.zeros((8, 8, 3), np.uint8)]
        )


def test_answers_leave_positions_for_a_prompt(tmp_path):
    directory = save_llava(tmp_path / "model")
    assert longest_prompt(directory, 4) + 4 == longest_prompt(directory, 5) + 5
    with pytest.raises(AntgmmError, match=r"--max-new-tokens 65536: .* positions for prompt and answer: choose fewer"):
        longest_prompt(directory, 65536)


def test_a_request_of_another_form_fails_alone(tmp_path):
    api = Answers(save_llava(tmp_path / "model"), "student", max_new_tokens=TOKENS, most=3, wait=0.0)
    api.setup("cpu")
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    bodies = [
        {"messages": request_messages(RECORDS[0])},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [url]}]},
        {"messages": [{"role": "user", "content": [{**url, "image_url": {"url": "http://a/base64,AAAA"}}]}]},
        {"messages": [{"role": "user", "content": "a\ud800"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
        {"messages": [{"role": "\x7f", "content": "a"}]},
        {"messages": request_messages(RECORDS[0]), "n": 2},
        {"messages": [{"role": "user", "content": [{**url, "image_url": {"url": "data:image/png;base64,AAA"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a"}}]}]},
    ]
    replies = [api.encode_response(one) for one in api.predict([api.decode_request(body) for body in bodies])]
    assert replies[0]["choices"][0]["message"]["content"] == in_jax(tmp_path / "model")[0]
    reasons = [json.loads(reply.body)["error"]["message"] for reply in replies[1:]]
    assert [reply.status_code for reply in replies[1:]] == [400] * 10
    words = ("no messages", "no chat request", "cannot be decoded", "no data URL", "half of a character")
    words += ("no chat request", "another role than system, user, assistant", "'n'")
    words += (
        "'data:image/png;base64',... holds no base64",
        "a part has the type 'video_url': send text or image_url",
    )
    for reason, word in zip(reasons, words, strict=True):
        assert word in reason
    # LitServe gives a server without batches one request at a time.
    alone = api.encode_response(api.predict(api.decode_request(bodies[1])))
    assert alone.status_code == 400 and "no messages" in json.loads(alone.body)["error"]["message"]
    assert api.encode_response(api.predict(api.decode_request(bodies[0])))["choices"] == replies[0]["choices"]


def test_a_panic_of_a_tokenizer_is_the_error_of_its_request(tmp_path):
    class PanicException(BaseException):
        pass

    def reads(*_):
        raise PanicException("bad pattern")

    api = Answers(save_llava(tmp_path / "model"), "student", max_new_tokens=TOKENS, most=3, wait=0.0)
    api.setup("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(api._model), "question", reads)
        reason = api.decode_request({"messages": request_messages(RECORDS[0])})
    assert reason == "the model cannot read the request: bad pattern"


def test_string_content_and_turns_are_read():
    image = base64.encodebytes(png(RECORDS[0].images[0])).decode()  # with line breaks
    turns = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}]},
    ]
    messages, images = conversation({"messages": turns})
    assert messages[0] == {"role": "system", "content": [{"type": "text", "text": "brief"}]}
    assert messages[1]["content"] == [{"type": "image"}]
    np.testing.assert_array_equal(images, RECORDS[0].images[:1])


def test_texts_of_a_system_turn_are_one_part():
    parts = [{"type": "text", "text": "be"}, {"type": "text", "text": " brief"}]
    (turn, _), _ = conversation({"messages": [{"role": "system", "content": parts}, {"role": "user", "content": "a"}]})
    assert turn["content"] == [{"type": "text", "text": "be brief"}]


def test_metrics_count_chat_requests_by_status():
    registry = CollectorRegistry()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 400})

    async def sent(message):
        pass

    counting = Metrics(app, registry)
    for path in (CHAT, "/health"):
        asyncio.run(counting({"type": "http", "path": path}, None, sent))
    assert registry.get_sample_value("antgmm_requests_total", {"status": "400"}) == 1
    assert registry.get_sample_value("antgmm_request_seconds_count") == 1


def test_ratios_are_those_of_requests_per_second():
    one = {"p50_ms": 10.0, "p95_ms": 20.0, "errors": 0, "other_answers": 1}
    models = {
        "teacher": {"questions": 4, "equal_to_jax": 4, "load": {"4": {**one, "requests_per_second": 2.0}}},
        "student": {"questions": 4, "equal_to_jax": 3, "load": {"4": {**one, "requests_per_second": 13.0}}},
    }
    assert rows(models)[:2] == [
        ("4", "teacher", "2", "10", "20", "0", "1", "1.00x"),
        ("4", "student", "13", "10", "20", "0", "1", "6.50x"),
    ]
    assert equal(models)[1] == "student: 3 of 4 answers are JAX's"


def _coded(record):
    return base64.b64encode(png(record.images[0])).decode()


def test_requests_have_bounds():
    turn = {"role": "user", "content": "a"}
    with pytest.raises(AntgmmError, match="over 1000 messages"):
        conversation({"messages": [turn] * 1001})
    with pytest.raises(AntgmmError, match="over 1000 parts"):
        conversation({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 1001}]})
    content = io.BytesIO()
    Image.new("1", (6000, 6000)).save(content, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    picture = {"type": "image_url", "image_url": {"url": url}}
    small = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_coded(RECORDS[0])}"}}
    with pytest.raises(AntgmmError, match="over 100 images"):
        conversation({"messages": [{"role": "user", "content": [small] * 101}]})
    with pytest.raises(AntgmmError, match="over 50000000 pixels together"):
        conversation({"messages": [{"role": "user", "content": [picture] * 2}]})


def test_a_request_may_hold_as_many_pixels_as_are_read():
    image = np.random.default_rng(0).integers(0, 256, (100, 1000, 3), np.uint8)  # of noise, which PNG cannot compress
    assert len(base64.b64encode(png(image))) * MOST_PIXELS / (100 * 1000) < LARGEST


def test_a_request_has_bounded_levels():
    def nested(levels):
        return {"messages": json.loads("[" * levels + "]" * levels)}

    assert shallow(nested(DEEPEST - 1)) == nested(DEEPEST - 1)
    with pytest.raises(ValueError, match=f"over {DEEPEST} levels"):
        shallow(nested(DEEPEST))


@pytest.mark.parametrize("body", ["{", "[]", '"a"', '{"messages":' + "[" * 900 + "]" * 900 + "}", "[" * 100_000])
def test_what_is_no_request_has_status_400(tmp_path, body):
    api = Answers(tmp_path, "m", max_new_tokens=TOKENS, most=2, wait=0.0)
    client = TestClient(application(api, "m", timeout=1.0).app)
    reply = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert len(reply.text) < 200


def test_a_server_without_batches_warns_of_nothing(tmp_path):
    # Warnings are errors in tests.
    application(Answers(tmp_path, "m", max_new_tokens=TOKENS, most=1, wait=0.01), "m", timeout=1.0)


def test_a_batch_that_is_too_large_is_answered_in_halves(tmp_path):
    model = load(save_llava(tmp_path / "model"), max_new_tokens=TOKENS, most=8)
    sizes = []

    def answer(batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("out of memory")
        return np.full((sizes[-1], TOKENS), model.pad)

    question = model.question([{"role": "user", "content": [{"type": "text", "text": "a"}]}], [])
    assert model._replace(answer=answer).answers([question] * 5) == [("", False, len(question.ids), TOKENS)] * 5
    assert sizes == [5, 2, 3, 1, 2]


def test_a_model_without_a_chat_template_reads_text_before_its_image_too(tmp_path):
    model = load(save_teacher(tmp_path / "model"), max_new_tokens=TOKENS, most=3)
    assert not model.processor.chat_template
    first, image, text = RECORDS[0].images, {"type": "image"}, {"type": "text", "text": "a b"}
    usual = model.question([{"role": "user", "content": [image, text]}], first)
    np.testing.assert_array_equal(model.question([{"role": "user", "content": [text, image]}], first).ids, usual.ids)
    parts = [{"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}]
    assert model.question([{"role": "user", "content": parts}], first).ids.shape[0] >= usual.ids.shape[0]
    with pytest.raises(AntgmmError, match="must be a single user turn"):
        model.question([{"role": "user", "content": [image, text]}, {"role": "assistant", "content": [text]}], first)


def test_tokens_that_the_files_do_not_name_are_those_of_the_processor(tmp_path):
    """Some released models name no padding token: 0 would be a word of theirs."""
    directory = save_llava(tmp_path / "model")
    processor = load_processor(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    fields = json.loads((directory / "config.json").read_text())
    for table in (fields, fields["text_config"]):
        for name in ("eos_token_id", "pad_token_id"):
            table.pop(name, None)
    (directory / "config.json").write_text(json.dumps(fields))
    processor.tokenizer.pad_token = "<unk>"
    processor.save_pretrained(directory)
    model = load(directory, max_new_tokens=TOKENS, most=3)
    assert model.pad == processor.tokenizer.convert_tokens_to_ids("<unk>") != 0
    assert model.ends == (processor.tokenizer.eos_token_id, 7)
