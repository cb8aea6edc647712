"""Quantized exports: their numbers are those of the formulas, and transformers loads them."""

import json
import re

import pytest
import torch
from safetensors import SafetensorError, safe_open

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.loading import load_processor
from data import maad
from data.record import PROMPT
from experiments.run.export import in_torch, quantized, quantizing
from experiments.run.export.card import Origin, write_card
from experiments.run.export.in_torch import split, torch_answers, torch_model
from experiments.run.export.quantized import Loss, _card, _loaded, publish_quantized
from experiments.run.export.quantizing import quantize
from experiments.run.export.schemes import Scheme
from experiments.run.rows.random_batches import random_batch
from experiments.run.rows.samples import Samples
from tests.experiments.tiny import save_llava, save_smolvlm, save_teacher

MODULE = "model.text_model.layers.1.mlp.up_proj"


def tensors(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_smolvlm(tmp_path_factory.mktemp("plain") / "model")


def test_w8a8_rounds_each_row_to_127_steps(plain, tmp_path):
    quantize(plain, tmp_path / "out", "w8a8")
    before, after = tensors(plain), tensors(tmp_path / "out")
    weight, stored, scale = before[f"{MODULE}.weight"], after[f"{MODULE}.weight"], after[f"{MODULE}.weight_scale"]
    assert (stored.dtype, scale.shape) == (torch.int8, (len(weight), 1))
    torch.testing.assert_close(scale[:, 0], weight.abs().amax(1) / 127.5)
    assert (stored * scale - weight).abs().max() <= 0.51 * scale.max()
    quantized = {name for name, tensor in after.items() if tensor.dtype == torch.int8}
    assert len(quantized) == 2 * 7
    assert all(name.startswith("model.text_model.layers.") for name in quantized)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - quantized)
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", "int-quantized")


@pytest.mark.parametrize("scheme", [*Scheme])
def test_transformers_computes_with_the_rounded_weights(plain, tmp_path, scheme):
    without_kernel = quantize(plain, tmp_path / "out", scheme.value)
    assert without_kernel == ([48] if scheme is Scheme.W4A16 else [])  # the model has 32 and 48
    batch = split(random_batch(open_hf(plain)[0], 2, answer=3))[1]
    model = torch_model(tmp_path / "out")
    torch_answers(model, batch, 3, 0)  # the first call decompresses
    weights = dict(model.named_modules())[MODULE].weight
    original = tensors(plain)[f"{MODULE}.weight"]
    steps = {Scheme.W8A8: 1 / 255, Scheme.W4A16: 1 / 15, Scheme.FP8: 1 / 16}[scheme]
    worst = (weights - original).abs() / original.abs().amax(1, keepdim=True)
    assert 0 < worst.max() <= 1.1 * steps


def test_a_device_must_have_room_for_unpacked_weights(plain, tmp_path, monkeypatch):
    quantize(plain, tmp_path / "out", "w4a16")
    packed = torch_model(tmp_path / "out").get_memory_footprint()
    unpacked = torch_model(plain).get_memory_footprint()
    for room, device in ((packed + 1, "cpu"), (2 * unpacked, "meta")):
        monkeypatch.setattr(in_torch, "torch_device", lambda nbytes, room=room: "meta" if nbytes < room else "cpu")
        model = _loaded(tmp_path / "out")
        weight = dict(model.named_modules())[MODULE].weight
        assert (model.device.type, weight.device.type) == (device, device)
        assert weight.dtype == torch.float32
    assert packed < unpacked


def test_a_quantized_export_is_scored_beside_it(tmp_path):
    export = save_llava(tmp_path / "export")
    write_card(export, open_hf(export)[0], Origin("trained", ""), PROMPT, title="Card")
    card = (export / "README.md").read_text()
    samples = Samples(maad.source("s", "test", 4), load_processor(export), open_hf(export)[0])
    loss = publish_quantized(export, Scheme.W8A8, samples, 3)
    out = Scheme.W8A8.beside(export)
    assert out == tmp_path / "export-w8a8"
    assert (loss.count, loss.before) == (4, 0.0)
    assert 0 <= loss.equal <= 4
    assert loss.bytes_after < loss.bytes_before
    assert "stored as w8a8" in (out / "README.md").read_text()
    assert (export / "README.md").read_text() == card
    assert {path.name for path in tmp_path.iterdir()} >= {"export", "export-w8a8"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # others may read the weights too


def test_what_free_text_loses_is_shown(tmp_path, monkeypatch, capsys):
    """No caption is right word by word, before or after, and one that is cut cannot be."""
    export = save_llava(tmp_path / "export")
    write_card(export, open_hf(export)[0], Origin("trained", ""), PROMPT, title="Card")
    samples = Samples(maad.source("s", "test", 4), load_processor(export), open_hf(export)[0])
    rouge = {True: 0.8, False: 0.1}
    monkeypatch.setattr(
        quantized,
        "_scored",
        lambda directory, *_: ({"exact_match": 0.0, "rouge_l": rouge[directory == export]}, ["text"] * 4),
    )
    loss = publish_quantized(export, Scheme.W8A8, samples, 1)
    assert (loss.points, loss.rouge_points) == (0.0, pytest.approx(70))
    shown = capsys.readouterr().err
    assert "exact match 0.000 (0.000, 0.0 points lost), ROUGE-L 0.100 (0.800, 70.0 points lost) on 4 questions" in shown
    assert "right answers are longer than max_new_tokens = 1 and count as wrong" in shown
    card = (Scheme.W8A8.beside(export) / "README.md").read_text()
    assert "ROUGE-L is\n0.100, before 0.800 (-70.0 points)" in card


@pytest.mark.parametrize("scheme", [*Scheme])
def test_the_card_of_a_copy_advises_what_works_for_it(scheme, tmp_path):
    """`antgmm eval` refuses quantized folders, and vLLM's kernels for four bits have no float32."""
    export = save_llava(tmp_path / "export")
    write_card(export, open_hf(export)[0], Origin("trained", ""), PROMPT, title="Card")
    before = (export / "README.md").read_text()
    text = _card(before, Loss(scheme.value, 0.5, 0.4, 0.8, 0.6, 3, 4, 9, 5))
    assert "`antgmm eval . " in before and "`antgmm eval` does it" in before
    assert "`antgmm eval . " not in text and "`antgmm eval` does it" not in text
    dtype = "bfloat16" if scheme is Scheme.W4A16 else "float32"
    assert set(re.findall(r"--dtype (\w+)", text)) == {dtype}
    assert "`antgmm eval --data DATA --url http://" in text
    assert "an\nexact match of 0.400, before 0.500 (-10.0 points); 3 answers are equal" in text
    assert "ROUGE-L is\n0.600, before 0.800 (-20.0 points)" in text


def test_a_quantized_model_is_for_servers(plain, tmp_path):
    quantize(plain, tmp_path / "out", "w8a8")
    with pytest.raises(AntgmmError, match="out is quantized, which only transformers and vLLM read: use the model"):
        open_hf(tmp_path / "out")


def test_a_disk_that_is_full_is_one_line(plain, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(quantizing, "convert_checkpoint", full)
    with pytest.raises(AntgmmError, match=r"out cannot be written \(.*No space left.*\): free disk space"):
        quantize(plain, tmp_path / "out", "w8a8")


@pytest.mark.parametrize("scheme", [*Scheme])
def test_a_model_that_nothing_would_serve_is_refused(tmp_path, scheme):
    """vLLM has no T5, and the hook by which transformers unpacks is not called by the `generate` of BLIP-2."""
    with pytest.raises(AntgmmError, match=f"nothing serves this model with {scheme.value}: vLLM, .* leave out"):
        quantize(save_teacher(tmp_path / "t5"), tmp_path / "out", scheme.value)


@pytest.mark.parametrize(("inputs", "size"), [((384, 256), 128), ((64, 96), 32), ((64, 48), None)])
def test_groups_of_four_bits_divide_all_inputs(inputs, size):
    weights = quantizing._scheme("w4a16", inputs).weights
    assert weights.group_size == size
    assert weights.strategy == ("group" if size else "channel")
