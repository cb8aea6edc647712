"""BLIP-2 beyond the suite: its released configs, OPT's positions, and what is refused."""

import copy

import numpy as np
import pytest
import transformers

from antgmm_jax.decoding import generate
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import FAMILIES
from antgmm_jax.presets import PRESETS
from pruning import check_basis
from tests.families.cases import batch, case_of, logits

BLIP = "blip2"


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return case_of(BLIP, "OPT", tmp_path_factory.getbasetemp())


def config_of(shape, **changes):
    """Returns the config of a shape with some fields changed."""
    fields = copy.deepcopy(FAMILIES[BLIP].tiny(0)[shape].fields)
    for name, values in changes.items():
        fields[name] = {**fields[name], **values} if isinstance(values, dict) else values
    hf = transformers.CONFIG_MAPPING["blip-2"].from_dict(copy.deepcopy(fields)).to_dict()
    return FAMILIES[BLIP].from_hf(hf, fields, tied=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "llama"}}, "blip-2 with text_config.model_type = 'llama' is not supported"),
        ({"text_config": {"do_layer_norm_before": False}}, "OPT with do_layer_norm_before = False is not supported"),
        ({"text_config": {"enable_bias": False}}, "OPT with enable_bias = False is not supported: it must be True"),
        ({"text_config": {"_remove_final_layer_norm": True}}, "OPT with _remove_final_layer_norm = True"),
        (
            {"text_config": {"word_embed_proj_dim": 12}},
            "word_embed_proj_dim = 12 is not supported: it must be hidden_s",
        ),
        ({"qformer_config": {"use_qformer_text_input": True}}, "use_qformer_text_input = true is not supported"),
        ({"image_token_index": None}, "config.json has no image_token_index"),
        (
            {"image_token_index": 160},
            r"image_token_index = 160, but the token table has 160 rows: .* call `resize_token_embeddings\(",
        ),
        (
            {"vision_config": {"image_size": 4}},
            "image_size = 4 and patch_size = 8 must be one number each, and a patch fit",
        ),
    ],
    ids=str,
)
def test_unsupported_variants_are_refused_by_field_and_value(changes, message):
    with pytest.raises(AntgmmError, match=message) as error:
        config_of("OPT", **changes)
    assert "\n" not in str(error.value)


def test_the_released_config_is_the_preset():
    """Fields of blip2-opt-2.7b; all others have the defaults of transformers."""
    text = {"model_type": "opt", "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32}
    text |= {"ffn_dim": 10240, "word_embed_proj_dim": 2560, "vocab_size": 50304}
    raw = {"model_type": "blip-2", "image_token_index": 50265, "text_config": text}
    hf = transformers.CONFIG_MAPPING["blip-2"].from_dict(copy.deepcopy(raw)).to_dict()
    assert FAMILIES[BLIP].from_hf(hf, raw, tied=True) == PRESETS["blip2-opt-2.7b"]


def test_a_row_longer_than_the_table_of_positions_is_refused(opt):
    arrays = batch(opt.config)
    long = {name: np.pad(arrays[name], ((0, 0), (0, 64))) for name in ("input_ids", "attention_mask")}
    message = "learned positions; shorten prompts or answers"
    with pytest.raises(AntgmmError, match=f"the model has 64 {message}"):
        logits(opt.config, opt.params, {**arrays, **long})
    with pytest.raises(AntgmmError, match=f"the model has 64 {message}"):
        generate(opt.config, opt.params, arrays, max_new_tokens=64, eos=1, pad=0)


def test_the_width_of_opt_has_no_principal_components(opt):
    """Its head cannot absorb the bias of the last norm."""
    with pytest.raises(AntgmmError, match="language/out has no bias to absorb the bias of its norm"):
        check_basis(opt.config, "text/embed")
