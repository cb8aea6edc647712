"""InternVL: tiles of an image, tensors that are never run, the released config, and what is refused."""

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from transformers import ProcessorMixin

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import FAMILIES, inputs
from antgmm_jax.io.convert import load_hf
from antgmm_jax.presets import PRESETS
from tests.families.cases import case_of, config_with, read_fields
from tests.families.test_inputs import assert_computed, assert_pictures, picture, processed, text_of

INTERNVL, SHAPE, FIRST_LAYER = "internvl", "Qwen2", "Llama, RMSNorm, no biases, first layer"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return case_of(INTERNVL, SHAPE, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("size", [(16, 16), (50, 21), (5, 300), (20000, 5), (64, 64)], ids=str)
def test_an_image_becomes_the_tiles_of_its_processor(case, size):
    processor = case.reads.processor
    processor.image_processor.max_patches = 6
    try:
        text, images = text_of(case.reads, [0]), [picture(*size)]
        ids, tree = case.reads(text, images)
        count = processor.image_processor.get_number_of_image_patches(*size[::-1], {"crop_to_patches": True})
        assert len(tree["pixels"]) == count
        assert (ids == case.config.image_token).sum() == count * case.config.image_tokens
        expected, theirs = processed(case.reads, images)
        np.testing.assert_array_equal(ids, expected)
        assert_pictures(case, case.reads, tree, theirs)
        assert_computed(case, case.reads, images[0])
    finally:
        processor.image_processor.max_patches = 2


def test_tensors_that_are_never_run_are_not_read(tmp_path_factory, tmp_path):
    """Layers behind the feature layer, and the mask token of pretraining."""
    case = case_of(INTERNVL, FIRST_LAYER, tmp_path_factory.getbasetemp())
    assert case.model.config.vision_config.num_hidden_layers == 2 and case.config.vision.stack.layers == 1
    tensors = load_file(case.directory / "model.safetensors")
    (prefix,) = {name.partition("vision_tower.")[0] for name in tensors if "cls_token" in name}
    mask = {f"{prefix}vision_tower.embeddings.mask_token": np.zeros((1, 1, 32), np.float32)}
    save_file(tensors | mask, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((case.directory / "config.json").read_text())
    assert load_hf(tmp_path)[0] == case.config


def test_the_released_config_is_the_preset():
    """Fields of InternVL3-1B-hf, in the spelling of transformers 4."""
    vision = {"model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True}
    vision |= {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "norm_type": "layer_norm", "use_qk_norm": False}
    text = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    text |= {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151674, "max_window_layers": 70}
    text |= {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768, "use_sliding_window": False}
    text["rope_scaling"] = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    raw = {"model_type": INTERNVL, "image_token_id": 151667, "downsample_ratio": 0.5, "projector_hidden_act": "gelu"}
    raw |= {"vision_feature_layer": -1, "vision_config": vision, "text_config": text}
    config = read_fields(raw)
    assert config == PRESETS["internvl3-1b"]
    # The fields that we write agree with the old ones next to them.
    written = FAMILIES[INTERNVL].to_hf(config)
    merged = {**raw, **written}
    merged |= {name: raw[name] | written[name] for name in ("vision_config", "text_config")}
    assert read_fields(merged) == config
    # vLLM applies rotary positions of the type "dynamic" to texts of any length, for which they change nothing.
    assert merged["text_config"]["rope_scaling"] is None
    assert written["text_config"]["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}


def test_a_head_is_tied_unless_the_config_says_otherwise():
    """Unlike LLaVA's, a config.json without the field ties them."""

    def says_tied(family, **fields):
        return FAMILIES[family].files.says_tied(transformers.CONFIG_MAPPING[family].from_dict(fields).to_dict())

    assert says_tied(INTERNVL) and not says_tied(INTERNVL, tie_word_embeddings=False)
    assert not says_tied("llava") and says_tied("llava", text_config={"tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {"use_qk_norm": True}}, "vision_config.use_qk_norm = True is not supported: it must be F"),
        ({"vision_config": {"use_mean_pooling": False}}, "use_mean_pooling = False is not supported: it must be True"),
        ({"vision_config": {"norm_type": "batch"}}, "norm_type = 'batch' must be layer_norm or rms_norm"),
        ({"vision_config": {"image_size": [16, 32]}}, r"image_size = \[16, 32\] and patch_size = 4 must be one number"),
        ({"vision_feature_select_strategy": "full"}, "select_strategy = 'full' is not supported: it must be 'default'"),
        ({"vision_feature_layer": [1, 2]}, r"vision_feature_layer = \[1, 2\] is not supported: it must be a single"),
        ({"downsample_ratio": 0.4}, "downsample_ratio = 0.4 must be 1 / n for an n that divides the 4 patches"),
    ],
    ids=str,
)
def test_variants_that_are_not_supported_are_refused_by_field_and_value(changes, message):
    with pytest.raises(AntgmmError, match=message) as error:
        config_with(INTERNVL, SHAPE, **changes)
    assert "\n" not in str(error.value)


def test_what_cannot_be_read_is_refused(case):
    with pytest.raises(AntgmmError, match="<video> stands for a video, which is not supported: use images"):
        case.reads("what is <video> ?", [])
    with pytest.raises(AntgmmError, match="needs a InternVLProcessor"):
        inputs(case.config, object.__new__(ProcessorMixin))
