"""Text models and image encoders of several types: refused variants, and the fields of an export."""

import json

import pytest
from transformers import AutoConfig

from antgmm_jax.axes import resize
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import FAMILIES, complete, family, violations
from antgmm_jax.families.common.text import text_config
from antgmm_jax.io.convert import _write_config
from tests.families.cases import FIRST, config_with, read_fields

LLAVA = "llava"
LLAMA, QWEN2, QWEN3, MISTRAL = (
    "2 KV heads",
    "SigLIP, Qwen2, tied",
    "CLIP, Qwen3",
    "SigLIP with its head, Mistral",
)


def text(**fields):
    return {"text_config": fields}


REFUSED = [
    (
        LLAMA,
        text(model_type="qwen3_moe"),
        "text_config.model_type = 'qwen3_moe' is not supported: it must be llama",
    ),
    (LLAMA, text(mlp_bias=True), "text_config.mlp_bias = True is not supported: use a checkpoint without it"),
    (LLAMA, text(num_key_value_heads=3), "num_attention_heads = 4 must be a multiple of num_key_value_heads = 3"),
    (
        LLAMA,
        text(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}),
        "text_config.rope_parameters.rope_type = 'linear' is not supported: it must be 'default', 'dynamic' or"
        " 'llama3'",
    ),
    (
        LLAMA,
        text(
            rope_parameters={
                "rope_type": "llama3",
                "factor": 8.0,
                "rope_theta": 500.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
            }
        ),
        "text_config.rope_parameters: low_freq_factor = 4 is not below high_freq_factor = 4: correct config.json",
    ),
    (
        MISTRAL,
        text(sliding_window=4096, max_position_embeddings=32768),
        "sliding_window = 4096 is not supported, as max_position_embeddings = 32768: set sliding_window = null in",
    ),
    (
        QWEN2,
        text(use_sliding_window=True, sliding_window=64, max_window_layers=2),
        "sliding_window = 64 is not supported, as max_position_embeddings = 32768: set use_sliding_window = false in",
    ),
    (
        MISTRAL,
        text(sliding_window=3, layer_types=["full_attention"] * 2),
        "sliding_window = 3 is not supported, as max_position_embeddings = ",
    ),
    (
        QWEN3,
        text(layer_types=["full_attention", "linear_attention"]),
        "text_config.layer_types has 'linear_attention': every layer must be 'full_attention'",
    ),
    (
        LLAMA,
        {"vision_config": {"model_type": "dinov2"}},
        "vision_config.model_type = 'dinov2' is not supported: it must be clip_vision_model or siglip_vision_model",
    ),
    (LLAMA, {"vision_feature_layer": [-2, -1]}, r"vision_feature_layer = \[-2, -1\] is not supported: it must be a"),
    (LLAMA, {"vision_feature_layer": 5}, "vision_feature_layer = 5 does not exist: the image encoder has 4 layers"),
    (
        QWEN2,
        {"vision_feature_select_strategy": "default"},
        "vision_feature_select_strategy = 'default' drops the first patch, as SigLIP has no class token: it must be",
    ),
]


@pytest.mark.parametrize(("shape", "changes", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_variants_that_are_not_supported_are_refused_by_field_and_value(shape, changes, message):
    with pytest.raises(AntgmmError, match=message) as error:
        config_with(LLAVA, shape, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        (MISTRAL, text(sliding_window=512, max_position_embeddings=512)),
        (QWEN2, text(use_sliding_window=True, sliding_window=64, max_window_layers=3)),
        (QWEN3, text(sliding_window=64)),
    ],
    ids=lambda value: str(value)[:50],
)
def test_windows_that_restrict_nothing_are_read(shape, changes):
    assert config_with(LLAVA, shape, **changes) == config_with(LLAVA, shape)


def test_a_list_of_one_feature_layer_is_that_layer():
    assert config_with(LLAVA, LLAMA, vision_feature_layer=[-2]) == config_with(LLAVA, LLAMA, vision_feature_layer=-2)


def test_a_checkpoint_of_the_original_llava_code_is_refused_by_name():
    raw = {"model_type": "llava", "hidden_size": 4096, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    with pytest.raises(AntgmmError, match=r"of the original LLaVA code: use the conversion to transformers \(llava-hf"):
        read_fields(raw)


def test_other_text_types_are_refused_where_servers_expect_llama():
    _, shape = next(one for one in FIRST if one[0] == "idefics3")
    with pytest.raises(AntgmmError, match="text_config.model_type = 'qwen2' is not supported: it must be llama"):
        config_with("idefics3", shape, text_config={"model_type": "qwen2"})


def test_lists_with_an_entry_per_layer_follow_the_layers():
    config = config_with(LLAVA, QWEN2)
    fields = text_config(resize(config, {"text/layers": 1}).language)
    assert (fields["layer_types"], fields["max_window_layers"]) == (["full_attention"], 1)
    assert fields["architectures"] == ["Qwen2ForCausalLM"] and "attention_bias" not in fields
    assert text_config(config_with(LLAVA, MISTRAL).language)["sliding_window"] is None


def test_a_list_with_an_entry_per_layer_is_not_copied_from_a_deeper_model(tmp_path):
    """Files of other versions of transformers have it for Mistral too, where it says nothing."""
    config = config_with(LLAVA, MISTRAL)
    layers = config.language.decoder.layers
    fields = FAMILIES[LLAVA].to_hf(config)
    (tmp_path / "like").mkdir()
    fields["text_config"] |= {"layer_types": ["full_attention"] * layers, "vocab_size": 99}
    (tmp_path / "like" / "config.json").write_text(json.dumps(fields))
    cut = resize(config, {"text/layers": layers - 1})
    _write_config(cut, {}, tmp_path, tmp_path / "like")
    read = AutoConfig.from_pretrained(tmp_path).text_config
    assert (read.num_hidden_layers, read.vocab_size) == (layers - 1, config.language.vocab)


def test_heads_of_a_qwen2_are_cut_with_the_width_only():
    """vLLM computes the width of a head from the two."""
    config = config_with(LLAVA, QWEN2)
    assert complete(config, {"text/heads": 1})["text/embed"] == 12
    with pytest.raises(AntgmmError, match="text/embed = 24 and text/heads = 1 conflict"):
        complete(config, {"text/heads": 1, "text/embed": 24})
    alone = resize(config, {"text/heads": 1})
    assert violations(alone) == ("text/embed = 24 must be 12 x text/heads = 1",)


@pytest.mark.parametrize(("shape", "legal"), [(LLAMA, False), (QWEN3, True), (MISTRAL, True)])
def test_heads_need_not_divide_the_width_except_llamas(shape, legal):
    odd = resize(config_with(LLAVA, shape), {"text/embed": 23, "bridge/mlp": 23})
    assert (violations(odd) == ()) == legal


def test_an_export_of_siglip_has_no_head_of_its_own():
    config = config_with(LLAVA, MISTRAL)
    fields = family(config).to_hf(config)
    assert fields["vision_config"]["vision_use_head"] is False
    assert fields["vision_feature_select_strategy"] == "full"
    assert not config.vision.has_cls and config.image_tokens == config.vision.patches
    # Layers after the feature layer are left out, so the last output is the feature layer.
    deeper = config_with(LLAVA, LLAMA)
    assert family(deeper).to_hf(deeper)["vision_feature_layer"] == -1 and deeper.vision.stack.layers == 3
