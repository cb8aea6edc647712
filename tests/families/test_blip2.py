"""BLIP-2 beyond the suite: its released configs, OPT's positions, and what is refused."""

import copy

import jax
import numpy as np
import pytest
import transformers

from antgmm_jax.blocks.language import check_positions
from antgmm_jax.decoding import forced_logits, generate
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import FAMILIES
from antgmm_jax.presets import PRESETS
from antgmm_jax.pure import functional
from pruning import check_basis
from tests.families.cases import batch, case_of, close, logits
from tests.families.test_packing import packed

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
    long = {name: np.pad(arrays[name], ((0, 0), (0, 64)), "edge") for name in ("input_ids", "attention_mask")}
    message = "learned positions; shorten prompts or answers"
    with pytest.raises(AntgmmError, match=f"the model has 64 {message}"):
        logits(opt.config, opt.params, {**arrays, **long})
    longest = arrays["attention_mask"].sum(axis=1).max()
    limits = {"max_new_tokens": int(64 - longest + 2), "eos": 1, "pad": 0}
    with pytest.raises(AntgmmError, match=f"a row of 65 tokens: the model has 64 {message}"):
        generate(opt.config, opt.params, arrays, **limits)
    with pytest.raises(AntgmmError, match=f"a row of 65 tokens: the model has 64 {message}"):
        forced_logits(opt.config, opt.params, arrays, np.zeros((4, limits["max_new_tokens"]), np.int32))


def test_padding_takes_no_learned_position(opt):
    """Prompts are padded to the longest one of all, and answers may use the rest of the positions."""
    arrays = batch(opt.config, pad="left")
    longest = arrays["attention_mask"].sum(axis=1).max()
    limits = {"max_new_tokens": int(64 - longest + 1), "eos": (), "pad": 0}
    wide = {name: np.pad(arrays[name], ((0, 0), (30, 0))) for name in ("input_ids", "attention_mask")}
    plain, padded = (generate(opt.config, opt.params, {**arrays, **more}, **limits) for more in ({}, wide))
    np.testing.assert_array_equal(padded, plain)


def test_positions_start_anew_for_each_sample_of_a_packed_row(opt):
    """A row of more tokens than learned positions, with as much padding behind its samples."""
    arrays = batch(opt.config)
    rows, where = packed(arrays, [[0, 1, 2, 3]])
    names = ("input_ids", "attention_mask", "segment_ids")
    rows |= {name: np.pad(rows[name], ((0, 0), (0, 80))) for name in names}
    apply = jax.jit(lambda params, batch: functional(opt.config).apply(params, batch)["logits"])
    together, apart = (np.asarray(apply(opt.params, given)) for given in (rows, arrays))
    for row, span, sample in where:
        close(together[row, span], apart[sample, : span.stop - span.start])


def test_without_a_program_the_lengths_of_rows_and_packed_samples_are_known(opt):
    language, valid = opt.config.language, np.arange(80)[None] < np.array([[64], [3]])
    segments = np.repeat(np.array([[1, 2, 0], [1, 0, 0]]), (50, 64, 80), axis=1)
    check_positions(language, valid)
    check_positions(language, segments > 0, segments=segments)
    with pytest.raises(AntgmmError, match="a row of 65 tokens: the model has 64 learned positions"):
        check_positions(language, valid, new=1)
    segments[0, 49] = 2
    with pytest.raises(AntgmmError, match="a row of 65 tokens: the model has 64 learned positions"):
        check_positions(language, segments > 0, segments=segments)


def test_the_width_of_opt_has_no_principal_components(opt):
    """Its head cannot absorb the bias of the last norm."""
    with pytest.raises(AntgmmError, match="language/out has no bias to absorb the bias of its norm"):
        check_basis(opt.config, "text/embed")
