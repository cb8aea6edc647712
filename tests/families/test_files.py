"""Checkpoints survive round trips bit for bit; models with all axes cut run in stock `transformers`."""

import copy
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import FAMILIES, family
from antgmm_jax.io.convert import check_supported, load_hf, open_hf, save_hf
from antgmm_jax.pure import local_axes
from pruning import gates_of, identity, legal_above, magnitude, ones, plan, random, shrink, shrink_hf
from tests.families.cases import batch, case_of, close, logits, reloaded, torch_logits
from tests.families.keeps import fewer, random_keep


def half(config):
    """Returns a keep of about half of the units of every axis that the family's files can describe."""
    targets = legal_above(config, {axis: -(-size // 2) for axis, size in sizes(config).items()})
    return plan(random(jax.random.key(1), sizes(config), local_axes(config)), config, targets)


def test_every_tensor_survives_a_round_trip_bit_for_bit(case, tmp_path):
    again = round_trip(case, tmp_path, torch.float32)
    arrays = batch(case.config)
    close(torch_logits(again, case, arrays), torch_logits(case.model, case, arrays))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tensors_of_two_bytes_survive_a_round_trip_bit_for_bit(first, tmp_path, dtype):
    round_trip(first, tmp_path, dtype)


def round_trip(case, tmp_path, dtype):
    """Asserts that every tensor of a model in a dtype is read and written unchanged; returns what PyTorch reads."""
    model = copy.deepcopy(case.model).to(dtype)
    model.save_pretrained(tmp_path / "in")
    config, params = load_hf(tmp_path / "in")
    assert config == case.config
    save_hf(config, params, tmp_path / "out")
    back_config, back = load_hf(tmp_path / "out")
    assert back_config == config
    jax.tree.map(np.testing.assert_array_equal, back, params)
    name = str(dtype).removeprefix("torch.")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(back)} == {name}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    again, original = reloaded(tmp_path / "out"), model.state_dict()
    # Layers that the model never runs are not written.
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, original[name].float(), rtol=0, atol=0)
    return again


def test_a_cut_of_all_axes_gives_the_gated_logits_in_transformers(every, tmp_path):
    config, params = every.config, every.params
    keep = half(config)
    smaller, cut = shrink(config, params, keep)
    # DeepStack may need every layer of the image encoder.
    present = sizes(config)
    cuttable = [axis for axis, size in present.items() if legal_above(config, {axis: -(-size // 2)})[axis] < size]
    assert all(sizes(smaller).get(axis, 0) < present[axis] for axis in cuttable) and len(cuttable) > 3
    save_hf(smaller, cut, tmp_path / "student", like=every.directory)
    arrays = batch(config)
    expected = torch_logits(reloaded(tmp_path / "student"), every, arrays)
    close(logits(config, params, arrays, {**ones(config), **gates_of(keep, config)}), expected)
    close(logits(smaller, cut, arrays), expected)


def test_a_cut_on_disk_equals_the_cut_in_memory_bit_for_bit(case, tmp_path):
    """Tensor by tensor, in half precision, into several files, with the other files of the directory."""
    source = tmp_path / "source"
    copy.deepcopy(case.model).to(torch.bfloat16).save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    config, params = load_hf(source)
    keep = half(config)
    smaller, cut = shrink(config, jax.tree.map(np.asarray, params), keep)
    save_hf(smaller, cut, tmp_path / "memory", like=source, max_shard_size="5KB")
    assert shrink_hf(source, keep, tmp_path / "disk", max_shard_size="5KB") == smaller
    memory, disk = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("memory", "disk")
    )
    assert disk == memory
    assert {"tokenizer.json", "model.safetensors.index.json"} < set(disk)


@pytest.mark.parametrize(("fraction", "seed"), [(0.4, 0), (0.4, 1), (0.7, 2), (0.7, 3), (0.7, 4)])
def test_any_cut_of_a_model_on_disk_equals_the_cut_in_memory(first, fraction, seed):
    """Includes shapes that `save_hf` would refuse, and a cut of a cut."""
    config, params = first.config, first.params
    keep = random_keep(config, fewer(config, fraction), seed)
    smaller, memory = shrink(config, params, keep)
    again, disk = shrink(*open_hf(first.directory), keep)
    assert again == smaller
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, disk), memory)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), disk) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), memory
    )
    deeper = {axis: index[..., -1:] for axis, index in identity(smaller).items() if axis.endswith("/mlp")}
    expected, got = shrink(smaller, memory, deeper)[1], shrink(smaller, disk, deeper)[1]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, got), expected)


def test_magnitude_on_disk_equals_magnitude_in_memory(case):
    config, stored = open_hf(case.directory)
    scores, expected = magnitude(stored, config), magnitude(case.params, config)
    assert set(scores) == set(sizes(config))
    for axis, score in expected.items():
        np.testing.assert_allclose(scores[axis], score, rtol=1e-6, err_msg=axis)


TIED = [("llava", "1 KV head, tied"), ("qwen3_vl", "one merger, tied"), ("blip2", "plain, tied, scaled")]


@pytest.mark.parametrize(("name", "shape"), TIED, ids=str)
def test_a_file_may_hold_the_shared_table_under_the_name_of_the_head(tmp_path, name, shape):
    one = case_of(name, shape, tmp_path)
    tensors = load_file(one.directory / "model.safetensors")
    (table,) = (key for key in tensors if key.endswith(("embed_tokens.weight", "shared.weight")))
    head = "lm_head.weight" if table.startswith("model.") else "language_model.lm_head.weight"
    tensors[head] = tensors.pop(table)
    save_file(tensors, one.directory / "model.safetensors", {"format": "pt"})
    config, params = load_hf(one.directory)
    assert config == one.config and config.language.tied
    jax.tree.map(np.testing.assert_array_equal, params, one.params)
    again = reloaded(one.directory)  # as transformers reads it
    torch.testing.assert_close(again.get_input_embeddings().weight, one.model.get_input_embeddings().weight)


OUTER, TEXT = {"tie_word_embeddings": False}, {"text_config": {"tie_word_embeddings": False}}


@pytest.mark.parametrize(
    ("name", "shape", "changes", "refused"),
    [
        (*TIED[0], OUTER, False),
        (*TIED[0], OUTER | TEXT, True),
        (*TIED[1], OUTER, True),
        (*TIED[1], TEXT, False),
        (*TIED[2], TEXT, False),
        ("blip2", "OPT", TEXT, True),
    ],
    ids=str,
)
def test_a_head_that_transformers_would_draw_at_random_is_refused(tmp_path, name, shape, changes, refused):
    """Some config.json tie it at the top and some in the part of the text; families differ in which of them counts."""
    one = case_of(name, shape, tmp_path)
    raw = json.loads((one.directory / "config.json").read_text())
    text = {"text_config": raw["text_config"] | changes.get("text_config", {})}
    (one.directory / "config.json").write_text(json.dumps(raw | changes | text))
    _, info = type(one.model).from_pretrained(one.directory, output_loading_info=True)
    assert bool(info["missing_keys"]) == refused
    if refused:
        head = family(one.config).files.head
        with pytest.raises(
            AntgmmError, match=f"has no tensor {head}, and its config.json does not tie the head"
        ) as error:
            load_hf(one.directory)
        assert "\n" not in str(error.value)
    else:
        assert load_hf(one.directory)[0].language.tied


@pytest.mark.parametrize("part", ["", "text_config"])
@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_weights_are_refused(tmp_path, name, part):
    raw = copy.deepcopy(next(iter(FAMILIES[name].tiny(0).values())).fields)
    (raw[part] if part else raw)["quantization_config"] = {"bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(AntgmmError, match="is quantized, which only transformers and vLLM read: use the model that"):
        check_supported(tmp_path)
