"""Gemma 3 beyond the suite: local and global layers, spans of images, its released config, and what is refused."""

import copy
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from antgmm_jax.blocks import spans
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import FAMILIES, inputs, new_processor
from antgmm_jax.families.common.words import user_turn
from antgmm_jax.io.convert import load_hf
from antgmm_jax.presets import PRESETS
from pruning import check_basis, shrink
from tests.families.cases import batch, case_of, close, logits, tokenizer, torch_logits

GEMMA, SHAPE = "gemma3", "local and global"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return case_of(GEMMA, SHAPE, tmp_path_factory.getbasetemp())


def config_of(**changes):
    """The config of the shape with some fields changed."""
    fields = copy.deepcopy(FAMILIES[GEMMA].tiny(0)[SHAPE].fields)
    for name, values in changes.items():
        fields[name] = {**fields[name], **values} if isinstance(values, dict) and name in fields else values
    hf = transformers.CONFIG_MAPPING[GEMMA].from_dict(copy.deepcopy(fields)).to_dict()
    return FAMILIES[GEMMA].from_hf(hf, fields, tied=True)


YARN = {"full_attention": {"rope_type": "default", "rope_theta": 500.0}} | {
    "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_tokens_per_image": 6}, "mm_tokens_per_image = 6 must be the square of a divisor of the 4 patches"),
        ({"mm_tokens_per_image": 9}, "mm_tokens_per_image = 9 must be the square of a divisor of the 4 patches"),
        ({"vision_config": {"patch_size": 20}}, "image_size = 16 and patch_size = 20 must be one number each"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "vision_config.model_type = 'clip_vision_model'"),
        ({"text_config": {"model_type": "gemma2"}}, "text_config.model_type = 'gemma2' is not supported"),
        ({"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping = 30.0 is not supported"),
        ({"text_config": {"attn_logit_softcapping": 50.0}}, "attn_logit_softcapping = 50.0 is not supported"),
        ({"text_config": {"use_bidirectional_attention": True}}, "use_bidirectional_attention is not supported"),
        ({"text_config": {"layer_types": ["chunked_attention"] * 3}}, "layer_types has 'chunked_attention': use"),
        ({"text_config": {"sliding_window": 1}}, "sliding_window = 1: it must be at least 2"),
        ({"text_config": {"query_pre_attn_scalar": 0}}, "query_pre_attn_scalar = 0: it must be at least 1"),
        ({"text_config": {"num_key_value_heads": 3}}, "num_attention_heads = 4 must be a multiple of num_key_value"),
        ({"text_config": {"rope_parameters": YARN}}, "rope_type 'linear' of sliding_attention is not supported"),
    ],
    ids=str,
)
def test_variants_that_are_not_computed_are_refused_by_field_and_value(changes, message):
    with pytest.raises(AntgmmError, match=message) as error:
        config_of(**changes)
    assert "\n" not in str(error.value)


def test_the_released_config_is_the_preset():
    """Fields of gemma-3-4b-it, as transformers 4.50 wrote them."""
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    raw = {"model_type": GEMMA, "image_token_index": 262144, "mm_tokens_per_image": 256}
    raw |= {"vision_config": vision, "text_config": text}
    hf = transformers.CONFIG_MAPPING[GEMMA].from_dict(copy.deepcopy(raw)).to_dict()
    config = FAMILIES[GEMMA].from_hf(hf, raw, tied=True)
    assert config == PRESETS["gemma3-4b"]
    # The fields that we write agree with the old ones next to them.
    merged = {**raw, "vision_config": vision | FAMILIES[GEMMA].to_hf(config)["vision_config"]}
    merged["text_config"] = text | FAMILIES[GEMMA].to_hf(config)["text_config"]
    again = transformers.CONFIG_MAPPING[GEMMA].from_dict(copy.deepcopy(merged)).to_dict()
    assert FAMILIES[GEMMA].from_hf(again, merged, tied=True) == config
    assert merged["text_config"].keys() <= text.keys() | transformers.Gemma3TextConfig().to_dict().keys()


def test_kept_layers_stay_local_or_global(case):
    assert case.config.language.decoder.local_layers == (0, 2)
    for layers, expected in (([0, 1], (0,)), ([1, 2], (1,)), ([0, 2], (0, 1)), ([1], ())):
        smaller, _ = shrink(case.config, case.params, {"text/layers": np.array(layers, np.int32)})
        assert smaller.language.decoder.local_layers == expected
        kinds = FAMILIES[GEMMA].to_hf(smaller)["text_config"]["layer_types"]
        assert [kind == "sliding_attention" for kind in kinds] == [layer in expected for layer in range(len(layers))]


def test_tokens_of_a_span_see_one_another_and_what_came_before():
    marked = jnp.array([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]], bool)
    numbers = spans.numbered(marked)
    np.testing.assert_array_equal(numbers, [[0, 1, 1, 0, 2, 0], [1, 1, 0, 0, 0, 2]])
    seen = np.asarray(spans.visible(numbers, 7))[:, 0]
    expected = np.broadcast_to(np.arange(7)[None, :] <= np.arange(6)[:, None], (2, 6, 7)).copy()
    expected[0, 1, 2] = expected[1, 0, 1] = True
    np.testing.assert_array_equal(seen, expected)
    near = np.asarray(spans.within(jnp.array([[2, 3]]), jnp.array([[0, 1, 2, 3, 4]]), 2))[0, 0]
    np.testing.assert_array_equal(near, [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def test_the_window_and_the_spans_are_seen(case):
    """The comparisons with PyTorch can fail: another window or causal images change the logits."""
    arrays = batch(case.config)
    expected = logits(case.config, case.params, arrays)
    wide = replace(case.config.language.decoder, window=100)
    wider = replace(case.config, language=replace(case.config.language, decoder=wide))
    assert np.abs(logits(wider, case.params, arrays) - expected).max() > 1e-2
    assert np.abs(logits(replace(case.config, image_token=159), case.params, arrays) - expected).max() > 1e-2


def test_the_head_of_siglip_is_not_read(case, tmp_path):
    """Some checkpoints store it; Gemma 3 does not run it."""
    fields = copy.deepcopy(FAMILIES[GEMMA].tiny(0)[SHAPE].fields)
    fields["vision_config"]["vision_use_head"] = True
    kind = transformers.Gemma3ForConditionalGeneration
    model = kind(transformers.CONFIG_MAPPING[GEMMA].from_dict(fields)).eval()
    model.load_state_dict(case.model.state_dict(), strict=False)
    model.save_pretrained(tmp_path / "head")
    assert any(".head." in name for name in load_file(tmp_path / "head" / "model.safetensors"))
    config, params = load_hf(tmp_path / "head")
    assert config == case.config
    arrays = batch(config)
    close(logits(config, params, arrays), torch_logits(model, case, arrays))


def test_released_tensor_names_are_read(case, tmp_path):
    """Releases of transformers put `model.` before the names, or `vision_model.` inside, or neither."""
    save_dir = tmp_path / "model"
    case.model.save_pretrained(save_dir)
    tensors = load_file(save_dir / "model.safetensors")
    old = {name.replace("vision_tower.", "vision_tower.vision_model."): one for name, one in tensors.items()}
    new = {f"model.{name.replace('language_model.model.', 'language_model.')}": one for name, one in tensors.items()}
    for spelled in (old, new):
        save_file(spelled, save_dir / "model.safetensors", metadata={"format": "pt"})
        config, params = load_hf(save_dir)
        assert config == case.config
        np.testing.assert_array_equal(params["bridge"]["kernel"], case.params["bridge"]["kernel"])


def test_pan_and_scan_and_foreign_processors_are_refused(case):
    processor = new_processor(case.config, tokenizer())
    processor.image_processor.do_pan_and_scan = True
    with pytest.raises(AntgmmError, match="do_pan_and_scan = true is not supported: set it to false"):
        inputs(case.config, processor)
    with pytest.raises(AntgmmError, match="needs a Gemma3Processor"):
        inputs(case.config, object.__new__(transformers.ProcessorMixin))


def test_a_turn_without_a_template_is_gemmas_own(case):
    processor = new_processor(case.config, tokenizer())
    processor.chat_template = None
    text = inputs(case.config, processor).chat(user_turn("what ?", 1))
    assert text == "<start_of_turn>user\n<start_of_image>what ?<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("text/embed", "a norm writes to its residual stream"),
        ("vision/embed", "no linear map absorbs the bias of vision/final_norm"),
    ],
)
def test_widths_have_no_principal_components(case, axis, message):
    with pytest.raises(AntgmmError, match=message):
        check_basis(case.config, axis)


def test_embeddings_are_scaled_in_their_own_dtype(case):
    """bfloat16 rounds the root of the width before it multiplies, as PyTorch's embedding does."""
    table = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = (table * torch.tensor(24**0.5).bfloat16()).float().numpy()
    ours = jnp.asarray(table.float().numpy(), jnp.bfloat16) * jnp.sqrt(jnp.float32(24)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), expected)
