"""Models that read images near their original size: squares, places, DeepStack, and errors."""

from dataclasses import replace

import numpy as np
import pytest
from transformers import ProcessorMixin

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import FAMILIES, family
from antgmm_jax.presets import PRESETS
from data.encoding import Encoder
from data.limits import BadRow
from data.record import Record
from pruning import plan, shrink
from pruning.keep import shrunk_config
from tests.families.cases import case_of, config_with, read_fields
from tests.families.test_inputs import picture, text_of

QWEN, SHAPE = "qwen3_vl", "two mergers"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return case_of(QWEN, SHAPE, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {"deepstack_visual_indexes": [1, 4]}}, r"\[1, 4\] must ascend within 0..3, as depth = 4"),
        ({"vision_config": {"deepstack_visual_indexes": [2, 1]}}, r"\[2, 1\] must ascend within 0..3"),
        ({"text_config": {"num_hidden_layers": 1}}, r"\[1, 2\] needs as many text layers, but num_hidden_layers = 1"),
        ({"vision_config": {"out_hidden_size": 24}}, "out_hidden_size = 24 must be text_config.hidden_size = 20"),
        ({"vision_config": {"num_position_embeddings": 15}}, "num_position_embeddings = 15 must be a square number"),
        ({"vision_config": {"patch_size": [4, 8]}}, r"patch_size = \[4, 8\]: it must be one number"),
        ({"vision_config": {"num_heads": 4}}, "hidden_size = 8 must be num_heads = 4 times a multiple of 4"),
        ({"text_config": {"head_dim": 16}}, r"\[2, 2, 2\] must be three numbers that sum to head_dim / 2 = 8"),
    ],
    ids=str,
)
def test_variants_that_are_not_computed_are_refused_by_field_and_value(changes, message):
    with pytest.raises(AntgmmError, match=message) as error:
        config_with(QWEN, SHAPE, **changes)
    assert "\n" not in str(error.value)


def test_the_released_config_is_the_preset():
    """Fields of Qwen3-VL-2B-Instruct, as transformers 4.57 wrote them."""
    vision = {"model_type": QWEN, "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
    vision |= {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304}
    vision |= {"out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17], "hidden_act": "gelu_pytorch_tanh"}
    text = {"model_type": "qwen3_vl_text", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    text |= {"rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "rope_theta": 5000000}
    text["rope_scaling"] = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    raw = {"model_type": QWEN, "image_token_id": 151655, "vision_config": vision, "text_config": text}
    config = read_fields(raw, tied=True)
    assert config == PRESETS["qwen3-vl-2b"]
    # The fields that we write agree with the old ones next to them.
    merged = {**raw, "vision_config": vision | FAMILIES[QWEN].to_hf(config)["vision_config"]}
    merged["text_config"] = text | FAMILIES[QWEN].to_hf(config)["text_config"]
    assert read_fields(merged, tied=True) == config


def test_the_vision_layers_that_deepstack_reads_stay_and_their_indexes_follow(case):
    taps, mergers = case.config.vision.taps, np.asarray(case.params["bridge"]["deepstack"]["up"])
    assert taps == (1, 2)
    scores = {"vision/layers": np.array([2, 0, 0, 1], np.float32)}
    for count, kept, expected in ((3, [0, 1, 2], (1, 2)), (2, [1, 2], (0, 1))):
        keep = plan(scores, case.config, {"vision/layers": count})
        np.testing.assert_array_equal(keep["vision/layers"], kept)
        smaller, params = shrink(case.config, case.params, keep)
        assert smaller.vision.taps == expected
        np.testing.assert_array_equal(params["bridge"]["deepstack"]["up"], mergers)
    with pytest.raises(AntgmmError, match=r"\[0, 2, 3\]: DeepStack needs the layers \[1, 2\]: keep them"):
        shrunk_config(case.config, {"vision/layers": np.array([0, 2, 3], np.int32)})
    with pytest.raises(AntgmmError, match="vision/layers = 1 must be at least 2: DeepStack reads as many"):
        plan(scores, case.config, {"vision/layers": 1})


def test_the_text_layers_that_deepstack_adds_to_stay(case):
    keep = {"text/layers": np.array([0, 2, 3], np.int32)}
    with pytest.raises(AntgmmError, match=r"DeepStack needs the layers \[0, 1\]: keep them"):
        shrunk_config(case.config, keep)
    scores = {"text/layers": np.array([0, 1, 2, 4, 3], np.float32)}
    np.testing.assert_array_equal(plan(scores, case.config, {"text/layers": 3})["text/layers"], [0, 1, 3])
    with pytest.raises(AntgmmError, match="text/layers = 1 must be at least 2, the number of DeepStack's mergers"):
        plan(scores, case.config, {"text/layers": 1})
    stale = replace(case.config, vision=replace(case.config.vision, taps=(1, 7)))
    assert family(stale).violations(stale) == ("DeepStack reads layer 7, but vision/layers = 4",)


@pytest.mark.parametrize("side", [(1, 1), (1, 190), (300, 7), (20000, 110)], ids=str)
def test_an_image_of_any_size_is_cut_into_the_squares_of_its_processor(case, side):
    _, tree = case.reads(text_of(case.reads, [0]), [picture(*side)])
    high, wide = tree["place"][0, 2:].tolist()
    patches = case.reads.processor.image_processor.get_number_of_image_patches(*side[::-1])
    assert high * wide == len(tree["pixels"]) == patches // case.config.vision.merge**2
    assert (wide > high) == (side[0] > side[1]) or high == wide
    np.testing.assert_array_equal(tree["place"][:, 0] * wide + tree["place"][:, 1], np.arange(high * wide))


def test_rows_that_cannot_be_read_are_refused(case):
    with pytest.raises(BadRow, match="an image of 300 x 1 pixels"):
        Encoder(case.reads.processor, case.config)(Record(question="?", answer="yes", images=(picture(300, 1),)))
    with pytest.raises(AntgmmError, match="an image of 300 x 1 pixels: one side may be at most 200 times the other"):
        case.reads(text_of(case.reads, [0]), [picture(300, 1)])
    with pytest.raises(AntgmmError, match=r"<\|video_pad\|> is the token of a video, which is not supported"):
        case.reads("what is <|video_pad|> ?", [])
    with pytest.raises(AntgmmError, match="needs a Qwen3VLProcessor"):
        type(case.reads)(case.config, object.__new__(ProcessorMixin))
