"""Collected intermediates equal PyTorch's: the states between layers and the norms of units."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch

from antgmm_jax.axes import sizes
from antgmm_jax.config import towers
from antgmm_jax.io.convert import load_hf
from antgmm_jax.pure import functional
from tests import reference

QUICK = {"xla_backend_optimization_level": 0}  # a program that runs once on tiny shapes
# Linear maps that read a layer's heads or hidden units. LLaVA uses two of its three image layers.
UNITS = {
    "blip2": {
        "vision/heads": r"vision_model.*\.projection",
        "vision/mlp": r"vision_model.*\.fc2",
        "bridge/heads": r"qformer.*\.attention\.output\.dense",
        "bridge/cross_heads": r"qformer.*\.crossattention\.output\.dense",
        "bridge/mlp": r"qformer.*\.output_query\.dense",
        "encoder/heads": r"language_model\.encoder.*\.SelfAttention\.o",
        "encoder/mlp": r"language_model\.encoder.*\.wo",
        "decoder/heads": r"language_model\.decoder.*\.SelfAttention\.o",
        "decoder/cross_heads": r"language_model\.decoder.*\.EncDecAttention\.o",
        "decoder/mlp": r"language_model\.decoder.*\.wo",
    },
    "llava": {
        "vision/heads": r".*vision_tower.*layers\.[01]\..*\.out_proj",
        "vision/mlp": r".*vision_tower.*layers\.[01]\..*\.fc2",
        "bridge/mlp": r".*multi_modal_projector\.linear_2",
        "text/heads": r".*language_model.*\.o_proj",
        "text/mlp": r".*language_model.*\.down_proj",
    },
}
# Linear maps that read the output of a layer's norms. The Q-Former's norm is last, so the next layer's map reads it.
WIDTHS = {
    "blip2": {
        "vision/embed": [r"vision_model.*\.(qkv|fc1)"],
        "bridge/embed": [r"qformer.*layer\.[12]\.attention\.attention\.query|language_projection"],
        "text/embed": [r"language_model\.encoder.*\.(q|wi_0)", r"language_model\.decoder.*\.(q|wi_0)"],
    },
    "llava": {
        "vision/embed": [r".*vision_tower.*layers\.[01]\..*\.(q_proj|fc1)"],
        "text/embed": [r".*language_model.*\.(q_proj|up_proj)"],
    },
}
# The final norms of a language model's stacks.
FINAL = {
    "encoder": r"language_model\.encoder\.final_layer_norm",
    "decoder": r"language_model\.decoder\.final_layer_norm",
    "text": r".*language_model\.norm",
}


def inputs_of(model, arrays, patterns):
    """The inputs of PyTorch's modules that match each pattern, layer by layer."""
    inputs_by_pattern = {pattern: [] for pattern in patterns}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].numpy()))
        for pattern, seen in inputs_by_pattern.items()
        for name, module in model.named_modules()
        if re.fullmatch(pattern, name)
    ]
    reference.logits(model, arrays)
    for hook in hooks:
        hook.remove()
    return inputs_by_pattern


@pytest.fixture(scope="module", params=UNITS)
def case(request, tmp_path_factory):
    """A PyTorch model, a batch with padded prompts and answers, and all intermediates that our model collects."""
    model = getattr(reference, request.param)()
    arrays = reference.batch(model)
    config, params = load_hf(reference.saved(model, tmp_path_factory.mktemp("m") / "m"))
    mask = arrays["attention_mask"] > 0
    counted, more = {"encoder": mask, "text": mask}, {}
    if "decoder_input_ids" in arrays:
        labels = arrays["decoder_input_ids"].copy()
        labels[2, -2:] = -100
        counted["decoder"], more = labels >= 0, {"labels": labels}
    axes = [axis for axis in sizes(config) if not axis.endswith("/layers")]
    names = (*axes, *(f"{tower}/states" for tower in towers(config)))
    apply = jax.jit(partial(functional(config).apply, collect=names), compiler_options=QUICK)
    collected = apply(params, {**reference.ours(arrays), **more})
    return SimpleNamespace(
        family=request.param, model=model, arrays=arrays, config=config, counted=counted, collected=collected
    )


def torch_states(case):
    """PyTorch's `hidden_states` by tower."""
    model, tensors = case.model, {name: torch.from_numpy(array) for name, array in case.arrays.items()}
    with torch.no_grad():
        whole = model(**tensors, output_hidden_states=True)
        if case.family == "llava":
            vision = model.model.vision_tower(tensors["pixel_values"], output_hidden_states=True)
            return {"vision": vision.hidden_states, "text": whole.hidden_states}
        vision = model.vision_model(tensors["pixel_values"], output_hidden_states=True)
        queries = model.query_tokens.expand(len(tensors["input_ids"]), -1, -1)
        bridge = model.qformer(queries, encoder_hidden_states=vision.last_hidden_state, output_hidden_states=True)
    language = whole.language_model_outputs
    towers = {"encoder": language.encoder_hidden_states, "decoder": language.decoder_hidden_states}
    return {"vision": vision.hidden_states, "bridge": bridge.hidden_states, **towers}


def test_states_equal_pytorchs_hidden_states(case):
    inputs = inputs_of(case.model, case.arrays, FINAL.values())
    expected = {tower: [state.numpy() for state in states] for tower, states in torch_states(case).items()}
    assert set(expected) == set(towers(case.config))
    for tower, states in expected.items():
        if tower in FINAL:
            # PyTorch norms the last entry of a language model; the input of that norm is the residual stream.
            (states[-1],) = inputs[FINAL[tower]]
        layers = towers(case.config)[tower].stack.layers
        assert len(states) == layers + 1 + (case.family == "llava" and tower == "vision")  # one layer is unused
        collected = np.asarray(case.collected[f"{tower}/states"])
        assert collected.shape == (layers + 1, *states[0].shape)
        seen = case.counted[tower] if tower in ("encoder", "text") else np.ones(collected.shape[1:3], bool)
        for mine, theirs in zip(collected, states, strict=False):
            reference.close(mine[seen], theirs[seen])


def norms(case, tower, inputs, units):
    """L2 norms of a layer's units over the counted tokens, [rows, units]."""
    counted = case.counted.get(tower, np.ones(inputs.shape[:2], bool))
    split = np.float64(inputs).reshape(*inputs.shape[:2], units, -1)
    return np.sqrt(np.sum(split**2, axis=(1, 3), where=counted[:, :, None, None]))


def test_unit_norms_equal_those_of_pytorchs_module_inputs(case):
    patterns = UNITS[case.family]
    inputs = inputs_of(case.model, case.arrays, patterns.values())
    assert set(patterns) == {axis for axis in sizes(case.config) if not axis.endswith(("/layers", "/embed"))}
    for axis, pattern in patterns.items():
        units, collected = sizes(case.config)[axis], np.asarray(case.collected[axis])
        expected = [norms(case, axis.split("/")[0], layer, units) for layer in inputs[pattern]]
        if axis == "bridge/cross_heads":  # at every second layer
            assert not collected[1::2].any()
            collected = collected[::2]
        collected = collected if collected.ndim == 3 else collected[None]  # LLaVA's projector has no layers
        for mine, theirs in zip(collected, expected, strict=True):
            reference.close(mine, theirs)


def test_width_norms_equal_those_of_pytorchs_norm_outputs(case):
    readers = WIDTHS[case.family]
    inputs = inputs_of(case.model, case.arrays, [pattern for patterns in readers.values() for pattern in patterns])
    assert set(readers) == {axis for axis in sizes(case.config) if axis.endswith("/embed")}
    for axis, patterns in readers.items():
        # T5's two stacks have equal weight, whatever their number of norms.
        towers = ("encoder", "decoder") if len(patterns) == 2 else (axis.split("/")[0],)
        units = sizes(case.config)[axis]
        means = [
            np.mean([norms(case, tower, layer, units) for layer in inputs[pattern]], axis=0)
            for tower, pattern in zip(towers, patterns, strict=True)
        ]
        reference.close(np.asarray(case.collected[axis]), np.mean(means, axis=0))
