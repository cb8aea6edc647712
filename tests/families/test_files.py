"""Checkpoints come back to the bit; everything cut at once is a checkpoint that stock `transformers` computes with."""

import copy

import jax
import numpy as np
import pytest
import torch

from antgmm_jax.axes import sizes
from antgmm_jax.convert import load_hf, save_hf
from antgmm_jax.functional import local_axes
from pruning import gates_of, legal_above, ones, plan, random, shrink, shrink_hf
from tests.families.cases import batch, close, logits, reloaded, torch_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tensor_survives_the_way_back_bit_for_bit(case, tmp_path, dtype):
    model = copy.deepcopy(case.model).to(dtype)
    model.save_pretrained(tmp_path / "in")
    config, params = load_hf(tmp_path / "in")
    assert config == case.config
    save_hf(config, params, tmp_path / "out")
    back_config, back = load_hf(tmp_path / "out")
    assert back_config == config
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(back)} == {str(dtype).removeprefix("torch.")}
    again, original = reloaded(tmp_path / "out"), model.state_dict()
    # Layers that the model never runs are not written.
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, original[name].float(), rtol=0, atol=0)
    if dtype == torch.float32:
        arrays = batch(config)
        close(torch_logits(again, case, arrays), torch_logits(case.model, case, arrays))


def test_everything_cut_at_once_computes_in_transformers_what_closed_gates_do(case, tmp_path):
    config, params = case.config, case.params
    targets = legal_above(config, {axis: -(-size // 2) for axis, size in sizes(config).items()})
    keep = plan(random(jax.random.key(1), sizes(config), local_axes(config)), config, targets)
    smaller, cut = shrink(config, params, keep)
    assert all(sizes(smaller)[axis] < size for axis, size in sizes(config).items() if size > 1)
    save_hf(smaller, cut, tmp_path / "memory", like=case.directory, max_shard_size="10KB")
    arrays = batch(config)
    expected = torch_logits(reloaded(tmp_path / "memory"), case, arrays)
    close(logits(config, params, arrays, {**ones(config), **gates_of(keep, config)}), expected)
    close(logits(smaller, cut, arrays), expected)
    # Cut on disk, a tensor at a time, the files are the same.
    assert shrink_hf(case.directory, keep, tmp_path / "disk", max_shard_size="10KB") == smaller
    memory, disk = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("memory", "disk")
    )
    assert disk == memory
