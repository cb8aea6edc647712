"""The comparison of exports in JAX and transformers with those on a server."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from data.maad import source
from experiments.commands.runs import TEACHER
from experiments.lab.servers import loading
from experiments.lab.servers.compare import compared, rows, run
from experiments.lab.servers.exports import conversations, expected, pruned_export, read
from experiments.lab.servers.loading import Load, command, measure
from experiments.lab.servers.under_load import DOWN, faults, under_load
from experiments.run.scores.server import Reply, request_messages
from tests import reference

OURS = {"text": "", "ids": [1, 2], "pixels": [0.5, 1.0], "jax": [7, 1, 0], "torch": [7, 1, 0]}


def test_equal_and_unequal_conversations_are_counted():
    served = [
        {"ids": [1, 2], "pixels": [0.5, 1.0], "answer": [7, 1]},
        {"ids": [1, 3], "pixels": [0.5, 1.25], "answer": [7, 2]},
    ]
    figures = compared([OURS, {**OURS, "torch": [8, 1, 0]}], served)
    assert figures == {"conversations": 2, "ids": 1, "pixels": 0.25, "unequal": 0, "torch": 1, "vllm": 1}
    lines = rows({"a": figures, "b": {**figures, "unequal": 3}, "c": {"not_served": ["no such model"]}})
    assert lines == [
        ("a", "1 of 2", "0.2", "1 of 2", "1 of 2"),
        ("b", "1 of 2", "0.2, 3 images of unequal size", "1 of 2", "1 of 2"),
        ("c", "-", "-", "-", "not served: no such model"),
    ]


def test_images_of_unequal_size_are_compared_without_padding():
    rng, served = np.random.default_rng(0), {"ids": [1, 2], "answer": [7, 1]}
    small, large = rng.uniform(1, 2, (3, 4, 6)), rng.uniform(1, 2, (3, 8, 5))
    padded = np.zeros((2, 3, 8, 6))
    padded[0, :, :4], padded[1, :, :, :5] = small, large
    theirs = {**served, "pixels": [small.tolist(), (large + 0.125).tolist()]}
    figures = compared([{**OURS, "pixels": [*padded]}], [theirs])
    assert figures["pixels"] == pytest.approx(0.125)
    assert figures["unequal"] == 0
    # Tiles of two images: a server makes more of the first one.
    few, many, same = (rng.uniform(1, 2, (number, 3, 4, 4)) for number in (1, 5, 1))
    figures = compared(
        [{**OURS, "pixels": [few, same]}], [{**served, "pixels": [many.tolist(), (same + 0.5).tolist()]}]
    )
    assert figures["pixels"] == pytest.approx(0.5)
    assert figures["unequal"] == 1


def test_servers_are_not_loaded_beside_a_process_that_holds_their_accelerator(monkeypatch, tmp_path):
    monkeypatch.setattr(loading.jax, "default_backend", lambda: "gpu")
    with pytest.raises(AntgmmError, match="hold the accelerator that the servers need: set JAX_PLATFORMS=cpu"):
        measure({}, Load([], 4, (1,), 1.0), tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


def test_vllm_is_not_measured_with_another_prompt_than_that_of_training(monkeypatch, tmp_path):
    without = SimpleNamespace(chat_template=None)
    monkeypatch.setattr(loading, "load_processor", lambda directory: without)
    monkeypatch.setattr(loading, "_measured", lambda *_: pytest.fail("a server was started"))
    with pytest.raises(AntgmmError, match=f"^{TEACHER} has no chat template.*leave out --vllm"):
        measure({"teacher": (TEACHER, "")}, Load([], 4, (1,), 1.0, vllm=tmp_path / "python"), tmp_path)


@pytest.mark.parametrize(
    ("files", "reason"),
    [(None, "student"), ({}, "student"), ({"quantization_config": {"quant_method": "fp8"}}, "is quantized")],
)
def test_both_models_are_read_before_the_first_is_served(tmp_path, monkeypatch, files, reason):
    monkeypatch.setattr(loading, "_measured", lambda *_: pytest.fail("a server was started"))
    student = tmp_path / "student"
    if files is not None:
        student.mkdir()
    if files:
        (student / "config.json").write_text(json.dumps({"model_type": "llava", **files}))
    with pytest.raises(AntgmmError, match=f"^[^\n]*{reason}[^\n]*$"):
        measure({"teacher": (TEACHER, ""), "student": (student, "")}, Load([], 4, (1,), 1.0), tmp_path)


@pytest.mark.long
def test_an_export_gives_equal_answers_in_jax_and_transformers(tmp_path):
    export = pruned_export("llava-tiny", tmp_path)
    processor = load_processor(export.directory)
    chats = conversations(tmp_path, processor)
    answers = expected(export, chats, 4)
    assert len(answers) == len(chats) == 6
    model = reference.reloaded(export.directory)
    for chat, ours in zip(chats, answers, strict=True):
        assert ours["jax"] == ours["torch"]
        messages, images = read(chat, tmp_path)
        options = {"images": images} if images else {}
        theirs = processor(text=processor.apply_chat_template(messages, add_generation_prompt=True), **options)
        assert ours["ids"] == [*theirs["input_ids"][0]]
        pixels = np.concatenate([np.ravel(one) for one in theirs["pixel_values"]]) if images else np.zeros(0)
        np.testing.assert_allclose(np.ravel(ours["pixels"]), pixels, rtol=0, atol=1e-6)
    assert model.config.vision_config.num_hidden_layers == 3 == load_hf(export.directory)[0].vision.stack.layers


def test_a_missing_interpreter_or_preset_is_named(tmp_path):
    with pytest.raises(AntgmmError, match="none does not exist: run `make vllm-env`"):
        run(tmp_path, tmp_path / "none")
    (tmp_path / "python").touch()
    with pytest.raises(AntgmmError, match="unknown preset 'llava-huge': use one of antgmm-tiny, "):
        run(tmp_path, tmp_path / "python", names=["llava-huge"])


@pytest.mark.parametrize("python", ["none", sys.executable])
def test_a_python_without_vllm_is_named(tmp_path, python):
    with pytest.raises(AntgmmError, match=f"{python} cannot import vLLM: name the Python of its environment"):
        measure({}, Load([], 4, (1,), 1.0, Path(python)), tmp_path)


def test_clients_send_requests_that_are_made_before(monkeypatch):
    """Else the time to read and encode pictures would count as the server's."""
    rows, read, sent = source("s", "test", 3), [], []

    class Read(list):
        def __getitem__(self, row):
            assert not sent
            read.append(row)
            return rows[row]

    def answered(server, messages, most):
        sent.append(messages)
        return Reply("yes", 0)

    monkeypatch.setattr("experiments.lab.servers.under_load.answer", answered)
    load = {"max_new_tokens": 4, "clients": 2, "duration": 0.05}
    figures = under_load(None, Read(), "{question}", ["yes", "yes", "no"], **load)
    assert read == [0, 1, 2] and len(sent) == figures["requests"] > 3
    expected = [request_messages(row, "{question}") for row in rows]
    assert all(messages in expected for messages in sent)
    assert figures["other_answers"] == sum(messages == expected[2] for messages in sent)


def test_the_load_of_a_server_that_is_down_ends(monkeypatch):
    """Thousands of refused requests a second say no more than the first ones."""
    replies = iter(["yes"] * 3)

    def answered(*_):
        if (text := next(replies, None)) is None:
            raise AntgmmError("the server is down")
        return Reply(text, 0)

    monkeypatch.setattr("experiments.lab.servers.under_load.answer", answered)
    figures = under_load(
        None, source("s", "test", 2), "{question}", ["yes"] * 2, max_new_tokens=4, clients=3, duration=600.0
    )
    assert figures["requests"] == 3 and DOWN <= figures["errors"] < 2 * DOWN
    loads = {"teacher": {"load": {"3": {"errors": 0}}}, "student": {"load": {"3": figures}}}
    assert faults(loads) == [f"student, 3 clients: {figures['errors']} errors, the first: the server is down"]


def test_a_loaded_server_computes_every_request_anew(monkeypatch):
    """Questions come again: a cache of prompts or of pictures would answer them."""
    monkeypatch.setattr(loading, "positions", lambda directory: 2048)
    words = command(Path("student"), Load([], 8, (1, 4), 1.0, Path("python")), "cuda", 8000)
    assert "--no-enable-prefix-caching" in words
    assert words[words.index("--mm-processor-cache-gb") + 1] == "0"


def test_vllm_computes_in_float32_on_a_cpu_alone(monkeypatch):
    """On a GPU a student is loaded as users serve it: in the dtype of its files, with captured graphs."""
    monkeypatch.setattr(loading, "positions", lambda directory: 2048)
    load = Load([], 4, (1, 8), 1.0, Path("python"))
    on_cpu, on_gpu = (command(Path("student"), load, platform, 80) for platform in ("cpu", "cuda"))
    assert on_cpu[on_cpu.index("--dtype") + 1] == "float32"
    assert {*on_cpu} - {*on_gpu} == {"--dtype", "float32", "--enforce-eager"}
