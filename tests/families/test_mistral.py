"""Mistral 3: stretched positions, rows of squares that end with a token, and what is refused."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Ministral3Config, ProcessorMixin
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from antgmm_jax.blocks.rope import rope, stretched
from antgmm_jax.config import Yarn
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import FAMILIES
from antgmm_jax.presets import PRESETS
from tests.families.cases import case_of, config_with, read_fields
from tests.families.test_inputs import LINE, picture

MISTRAL, PLAIN, YARN = "mistral3", "Mistral, biases", "Ministral, tied"
ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
ROPE |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return case_of(MISTRAL, PLAIN, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(
    ("changes", "yarn"),
    [
        ({}, Yarn(factor=16.0, original=16384, fast=32.0, slow=1.0, query_growth=0.1)),
        (
            {"factor": 3.5, "original_max_position_embeddings": 40, "beta_fast": 7.0},
            Yarn(factor=3.5, original=40, fast=7.0, slow=1.0, query_growth=0.1),
        ),
    ],
    ids=["released", "short"],
)
def test_positions_are_stretched_as_in_transformers(changes, yarn):
    text = Ministral3Config(rope_parameters=copy.deepcopy({**ROPE, **changes}))
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](text)
    assert factor == 1.0
    np.testing.assert_allclose(stretched(128, 1e6, yarn), frequencies.numpy(), rtol=1e-6)


def test_queries_grow_beyond_the_original_positions():
    at = np.array([[0, 9, 10, 35, 1000]])
    angles = rope(jnp.asarray(at), 8, 500.0, yarn=Yarn(factor=2.0, original=10, fast=32.0, slow=1.0, query_growth=0.3))
    expected = get_llama_4_attn_scale(torch.from_numpy(at), 0.3, 10).numpy()[:, 0, :, 0]
    np.testing.assert_allclose(angles.query_factor, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        (PLAIN, {"vision_feature_layer": -2}, "vision_feature_layer = -2 is not supported: it must be -1"),
        (PLAIN, {"vision_feature_layer": [-1, -2]}, r"vision_feature_layer = \[-1, -2\] is not supported"),
        (
            PLAIN,
            {"vision_config": {"num_attention_heads": 12}},
            "24 must be num_attention_heads = 12 times",
        ),
        (
            PLAIN,
            {"vision_config": {"image_size": 7}},
            "image_size = 7 must be at least spatial_merge",
        ),
        (PLAIN, {"vision_config": {"patch_size": [4, 8]}}, r"patch_size = \[4, 8\]: it must be one number"),
        (
            PLAIN,
            {"text_config": {"num_key_value_heads": 3}},
            "num_attention_heads = 4 must be a multiple of num_key_value",
        ),
        (PLAIN, {"text_config": {"sliding_window": 8}}, "sliding_window = 8 is not supported: it must be null"),
        (PLAIN, {"text_config": {"model_type": "qwen2"}}, "'qwen2' is not supported: use 'mistral' or 'ministral3'"),
        (PLAIN, {"text_config": {"rope_parameters": ROPE}}, "'yarn' of mistral is not supported: it must be"),
        (YARN, {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}}, "it must be 'yarn'"),
        (
            YARN,
            {"text_config": {"rope_parameters": {**ROPE, "mscale": 0.7}}},
            "mscale and mscale_all_dim must be equal",
        ),
        (YARN, {"text_config": {"rope_parameters": {**ROPE, "attention_factor": 1.2}}}, "attention_factor absent"),
        (YARN, {"text_config": {"rope_parameters": {**ROPE, "truncate": False}}}, "truncate = False is not supported"),
        (YARN, {"text_config": {"rope_parameters": {**ROPE, "llama_4_scaling_beta": None}}}, "beta is missing: set it"),
    ],
    ids=str,
)
def test_variants_that_are_not_computed_are_refused_by_field_and_value(shape, changes, message):
    with pytest.raises(AntgmmError, match=message) as error:
        config_with(MISTRAL, shape, **changes)
    assert "\n" not in str(error.value)


def test_the_released_config_is_the_preset():
    """Fields of Ministral-3-3B-Instruct-2512-BF16."""
    vision = {"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "head_dim": 64, "image_size": 1540, "patch_size": 14, "hidden_act": "silu"}
    vision |= {"num_channels": 3, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    text = {"model_type": "ministral3", "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072}
    text |= {
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "sliding_window": None,
        "rope_parameters": {**ROPE, "type": "yarn"},
    }
    raw = {"model_type": MISTRAL, "image_token_index": 10, "spatial_merge_size": 2, "vision_feature_layer": -1}
    raw |= {"vision_config": vision, "text_config": text, "projector_hidden_act": "gelu"}
    config = read_fields(raw, tied=True)
    assert config == PRESETS["ministral-3-3b"]
    assert read_fields({**raw, "vision_feature_layer": [-1]}, tied=True) == config
    # The fields that we write agree with the old ones next to them.
    ours = FAMILIES[MISTRAL].to_hf(config)
    merged = {name: {**raw[name], **ours[name]} if isinstance(ours[name], dict) else ours[name] for name in ours}
    assert read_fields(merged, tied=True) == config
    # vLLM 0.32 reads the growth of queries from this field alone (models/mistral.py).
    assert ours["text_config"]["llama_4_scaling"] == {"original_max_position_embeddings": 16384, "beta": 0.1}


def test_each_row_of_squares_ends_with_a_token(case):
    ids, tree = case.reads(LINE + case.reads.processor.image_token, [picture(20, 11)])
    assert tree["place"][0, 2:].tolist() == [2, 3]
    token, (row, end) = case.config.image_token, case.reads.processor.image_token_ids[1:]
    assert ids[-8:].tolist() == [token, token, token, row, token, token, token, end]


@pytest.mark.parametrize(("side", "grid"), [((1, 1), (1, 1)), ((192, 6), (1, 4)), ((3, 90), (4, 1))], ids=str)
def test_images_of_any_size_are_cut_to_squares(case, side, grid):
    _, tree = case.reads(LINE + case.reads.processor.image_token, [picture(*side)])
    assert tree["place"][0, 2:].tolist() == [*grid] and len(tree["pixels"]) == grid[0] * grid[1]


def test_what_cannot_be_read_is_refused(case):
    with pytest.raises(AntgmmError, match="an image of 200 x 5 pixels: one side may be at most 32 times the other"):
        case.reads(LINE, [picture(200, 5)])
    with pytest.raises(AntgmmError, match="needs a PixtralProcessor: save one in its folder"):
        type(case.reads)(case.config, object.__new__(ProcessorMixin))
    processor = copy.deepcopy(case.reads.processor)
    processor.spatial_merge_size, processor.patch_size = 4, 2
    with pytest.raises(AntgmmError, match="the processor's spatial_merge_size is 4, the model's 2"):
        type(case.reads)(case.config, processor)
