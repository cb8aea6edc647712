"""The export gate passes differences that float64 shows to be rounding, and nothing else."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch

from antgmm_jax.errors import memory_error
from antgmm_jax.io.convert import load_hf
from experiments.run.export import export_gate, in_torch
from experiments.run.rows.random_batches import random_batch
from tests import reference
from tests.families.cases import case_of


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = reference.saved(reference.blip2(), tmp_path_factory.mktemp("gate") / "export")
    return directory, *load_hf(directory)


def check(directory, config, params):
    batches = [random_batch(config, 3)]
    return export_gate.check(directory, config, params, batches, max_new_tokens=4, eos=1, pad=0)


def test_an_export_within_the_tolerance_needs_no_float64(exported, monkeypatch):
    loads = []
    load = export_gate.torch_model
    monkeypatch.setattr(export_gate, "torch_model", lambda directory: loads.append(directory) or load(directory))
    result = check(*exported)
    assert result.passed and result.torch_rounding == 0.0
    assert len(loads) == 1


def test_an_encoder_is_recognised_without_a_field_of_the_whole_model(tmp_path):
    """Only InstructBLIP's `text_config` says `is_encoder_decoder`; an answer begins behind the start token."""
    case = case_of("instructblip", "T5", tmp_path)
    assert not case.model.config.is_encoder_decoder
    result = check(case.directory, case.config, case.params)
    assert result.passed and result.answers_equal == 1.0


@pytest.mark.parametrize("of", [("blip2", "gated"), ("instructblip", "Llama")], ids=" ".join)
def test_rows_without_a_picture_are_compared_with_a_picture_that_has_no_place(of, tmp_path):
    """The PyTorch models of these families need `pixel_values`."""
    case = case_of(*of, tmp_path)
    batch = random_batch(case.config, 3)
    ids = {name: np.where(batch[name] == 3, 7, batch[name]) for name in ("input_ids", "prompt/input_ids")}
    batch |= ids | {"images": {name: leaf[:, :0] for name, leaf in batch["images"].items()}}
    result = export_gate.check(case.directory, case.config, case.params, [batch], max_new_tokens=4, eos=1, pad=0)
    assert result.passed and result.answers_equal == 1.0
    row = jax.tree.map(lambda leaf: leaf[:1], in_torch.split(batch)[1])
    assert np.isfinite(in_torch.torch_gap(in_torch.torch_model(case.directory), row, 0, (5, 9)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NaN parameters cause it
def test_nan_logits_do_not_pass(exported):
    directory, config, params = exported
    language = params["language"]
    norm = {**language["norm"], "scale": np.full_like(language["norm"]["scale"], np.nan)}
    result = check(directory, config, {**params, "language": {**language, "norm": norm}})
    assert not result.passed
    assert result.where.startswith("logits of sample 0 differ by nan")


def test_a_different_answer_fails_and_is_named(exported, monkeypatch):
    """One token of one answer differs; the last row of the batch occurs twice and counts once."""
    answers = export_gate.torch_answers

    def other(*about):
        changed = answers(*about)
        changed[2, 0] += 1
        return changed

    monkeypatch.setattr(export_gate, "torch_answers", other)
    directory, config, params = exported
    batch = {**random_batch(config, 4), "id": np.array(["a", "b", "c", "c"]), "index": np.array([0, 1, 2, 2])}
    result = export_gate.check(directory, config, params, [batch], max_new_tokens=4, eos=1, pad=0)
    assert not result.passed
    assert (result.prompts, result.answers_equal) == (3, pytest.approx(2 / 3))
    assert result.where.startswith("the answer to sample c differs: JAX [")


@pytest.mark.parametrize("model", [reference.blip2, reference.llava])
def test_generation_settings_do_not_affect_the_gate(model, tmp_path):
    directory = reference.saved(model(), tmp_path / "export")
    note = directory / "generation_config.json"
    defaults = json.loads(note.read_text()) if note.exists() else {}
    note.write_text(json.dumps({**defaults, "num_beams": 3, "repetition_penalty": 9.0, "min_new_tokens": 4}))
    assert check(directory, *load_hf(directory)).passed


@pytest.mark.parametrize(("ours", "passes"), [(4e-3, True), (6e-3, False)])
def test_above_the_tolerance_the_bound_is_the_rounding_of_all_prompts(exported, monkeypatch, ours, passes):
    """PyTorch rounds the second prompt by 1e-3, so the first, exact one may differ by five times as much."""
    logits = export_gate.torch_logits

    def rounded(model, inputs, batch):
        values = logits(model, inputs, batch).astype(np.float64)
        if model.dtype == torch.float64:
            values[1, 0, 0] += 1e-3
        values[0, 0, 0] += ours
        return values

    monkeypatch.setattr(export_gate, "torch_logits", rounded)
    result = check(*exported)
    assert result.passed == passes
    assert result.torch_rounding == pytest.approx(1e-3, rel=1e-2)
    assert result.max_abs_logit_diff == pytest.approx(ours, rel=1e-2)
    assert passes or result.where == "logits of sample 0 differ by 0.006, more than 0.005"


def test_changed_parameters_fail_by_name(exported):
    """Parameters scaled by 1.0001, the bound's docstring example, and a single norm scaled by 1.001, fail."""
    directory, config, params = exported
    language = params["language"]
    norm = {**language["norm"], "scale": language["norm"]["scale"] * np.float32(1.001)}
    one = check(directory, config, {**params, "language": {**language, "norm": norm}})
    assert not one.passed and one.max_abs_logit_diff > 10 * one.torch_rounding
    result = check(directory, config, jax.tree.map(lambda leaf: leaf * np.float32(1.0001), params))
    assert not result.passed
    assert result.where.startswith("logits of sample ")
    assert result.max_abs_logit_diff > 10 * result.torch_rounding > 0.0


def test_a_tie_within_the_bound_is_equal(exported, monkeypatch):
    """PyTorch chooses the other of two tokens; their logits differ by less or by more than twice the bound."""
    answers = export_gate.torch_answers

    def other(*about):
        changed = answers(*about)
        changed[1, 0] += 1
        return changed

    monkeypatch.setattr(export_gate, "torch_answers", other)
    monkeypatch.setattr(export_gate, "ROUNDING", 0.0)
    for gap, equal in ((1e-7, 1.0), (0.5, 2 / 3)):
        monkeypatch.setattr(export_gate, "torch_gap", lambda *_, gap=gap: gap)
        result = check(*exported)
        assert (result.passed, result.ties) == (equal == 1.0, int(equal == 1.0))
        assert result.answers_equal == pytest.approx(equal)


@pytest.mark.parametrize("model", [reference.blip2, reference.llava])
def test_the_gap_of_two_tokens_is_that_of_pytorchs_logits(model, tmp_path):
    """At the second token of an answer, against a forward pass over prompt and first token."""
    directory = reference.saved(model(), tmp_path / "export")
    config, _ = load_hf(directory)
    _, prompt = in_torch.split(random_batch(config, 1))
    torch_side = in_torch.torch_model(directory)
    in_torch.stop_at(torch_side, eos=1, pad=0)
    first = int(in_torch.torch_answers(torch_side, prompt, 1, 0)[0, 0])
    tensors = in_torch.torch_tensors(torch_side, prompt)
    if torch_side.config.is_encoder_decoder:
        tensors["decoder_input_ids"] = torch.tensor([[0, first]])
    else:
        tensors["input_ids"] = torch.cat([tensors["input_ids"], torch.tensor([[first]])], 1)
        tensors["attention_mask"] = torch.nn.functional.pad(tensors["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        logits = torch_side(**tensors).logits[0, -1]
    gap = in_torch.torch_gap(torch_side, prompt, 1, (5, 9))
    assert gap == pytest.approx(abs(float(logits[5] - logits[9])), abs=1e-4)


class _Crowded:
    """A model on a GPU without room."""

    device = SimpleNamespace(type="cuda")

    def to(self, place):
        self.device = SimpleNamespace(type=place)


@pytest.mark.parametrize("moves", [True, False])
def test_a_gpu_without_room_beside_jax_leaves_pytorch_to_the_cpu(moves, capsys):
    def call(model, more):
        if model.device.type == "cuda" or not moves:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return more + 1

    model = _Crowded()
    if moves:
        assert in_torch.on_cpu_if_crowded(call)(model, 1) == 2
    else:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            in_torch.on_cpu_if_crowded(call)(model, 1)
        assert str(memory_error(caught.value)).startswith("not enough memory for 2.00 GiB: choose")
    assert model.device.type == "cpu"
    assert "PyTorch continues on the CPU" in capsys.readouterr().err
