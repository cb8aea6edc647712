"""Image encoders with windows: patches of a window, layers with windows, and refused configs."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import ProcessorMixin
from transformers.vision_utils import get_vision_window_index

from antgmm_jax.blocks import blocked, windows
from antgmm_jax.blocks.grids import places, window_of_slot
from antgmm_jax.blocks.packed import PackedConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import FAMILIES, violations
from antgmm_jax.presets import PRESETS
from pruning import plan, shrink
from tests.families import cases
from tests.families.cases import case_of, config_with, read_fields

QWEN, SHAPE = "qwen2_5_vl", "windows of four squares"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return case_of(QWEN, SHAPE, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("side", [1, 2, 3], ids=str)
def test_squares_share_a_window_as_in_transformers(side):
    sizes = [(3, 5), (1, 1), (4, 6), (2, 7)]
    order, ends = get_vision_window_index(torch.tensor([(1, 2 * h, 2 * w) for h, w in sizes]), 2, 8 * side, 4)
    expected = np.empty(len(order), int)
    expected[order.numpy()] = np.searchsorted(ends.numpy() // 4, np.arange(len(order)), side="right")
    place = np.concatenate([places(*size) for size in sizes])
    valid = np.arange(len(place) + 2) < len(place)
    row = {"place": np.pad(place, ((0, 2), (0, 0)))[None], "valid": valid[None]}
    numbers = np.asarray(window_of_slot(row, side))[0]
    assert (numbers[~valid] == -1).all()
    np.testing.assert_array_equal(numbers[valid][:, None] == numbers[valid], expected[:, None] == expected)


@pytest.mark.parametrize("shape", [SHAPE, "windows only, wide patches"])
def test_rows_of_several_large_pictures_equal_pytorchs(monkeypatch, tmp_path_factory, shape):
    """Rows that are long enough for attention within windows and, in the other layers, in blocks."""
    case = case_of(QWEN, shape, tmp_path_factory.getbasetemp())
    monkeypatch.setattr(cases, "_picture", lambda rng, *_: places(*rng.integers(4, 9, 2).tolist()))
    monkeypatch.setattr(blocked, "LARGEST", 0)
    arrays = cases.batch(case.config)
    assert isinstance(case.config, PackedConfig)
    segments = jnp.zeros((1, arrays["images"]["valid"].shape[1] * case.config.vision.merge**2), jnp.int32)
    assert windows.pay(windows.Windows(segments, case.config.vision.reach), segments.shape[1])
    cases.close(cases.logits(case.config, case.params, arrays), cases.torch_logits(case.model, case, arrays))


@pytest.mark.parametrize(
    ("layers", "local", "full"), [([0, 1, 3], (0,), [1, 2]), ([1, 2], (1,), [0]), ([0, 2], (0, 1), [])], ids=str
)
def test_layers_stay_of_their_kind(case, layers, local, full):
    assert case.config.vision.stack.local_layers == (0, 2)
    smaller, _ = shrink(case.config, case.params, {"vision/layers": np.array(layers, np.int32)})
    assert smaller.vision.stack.local_layers == local
    assert FAMILIES[QWEN].to_hf(smaller)["vision_config"]["fullatt_block_indexes"] == full


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [15]), (8, [0, 1, 2, 3, 4, 5, 6, 15]), (16, [*range(7), *range(8, 15), 15, 23])], ids=str
)
def test_a_share_of_the_global_layers_stays(count, kept):
    """Of 32 layers, 4 are global: here all have low scores, 15 the best, then 23."""
    config, scores = PRESETS["qwen2.5-vl-7b"], 1.0 - np.arange(32) / 64
    apart = np.flatnonzero(np.logical_not(config.vision.stack.is_local))
    np.testing.assert_array_equal(apart, [7, 15, 23, 31])
    scores[apart] = [0.2, 0.4, 0.3, 0.1]
    chosen = plan({"vision/layers": scores}, config, {"vision/layers": count})["vision/layers"]
    np.testing.assert_array_equal(chosen, kept)


def test_text_heads_go_with_the_width(case):
    scores = {"text/heads": np.ones((3, 2), np.float32), "text/embed": np.ones(24, np.float32)}
    assert {name: kept.shape for name, kept in plan(scores, case.config, {"text/heads": 1}).items()} == {
        "text/heads": (3, 1),
        "text/embed": (12,),
    }
    smaller, _ = shrink(case.config, case.params, {"text/heads": np.zeros((3, 1), np.int32)})
    assert violations(smaller) == ("text/embed = 24 must be 12 x text/heads = 1",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {"fullatt_block_indexes": [1, 4]}}, r"\[1, 4\] must ascend within 0..3, as depth = 4"),
        ({"vision_config": {"fullatt_block_indexes": [3, 1]}}, r"\[3, 1\] must ascend within 0..3"),
        ({"vision_config": {"window_size": 7}}, "window_size = 7 must be at least spatial_merge_size x patch_size = 8"),
        ({"vision_config": {"out_hidden_size": 20}}, "out_hidden_size = 20 must be text_config.hidden_size = 24"),
        ({"vision_config": {"num_heads": 4}}, "hidden_size = 8 must be num_heads = 4 times a multiple of 4"),
        ({"vision_config": {"temporal_patch_size": [2]}}, r"temporal_patch_size = \[2\]: it must be one number"),
        (
            {"text_config": {"num_attention_heads": 2}},
            r"\[1, 1, 1\] must be three numbers that sum to head_dim / 2 = 6",
        ),
        ({"text_config": {"num_attention_heads": 5}}, "hidden_size = 24 must be a multiple of num_attention_heads = 5"),
        ({"text_config": {"use_sliding_window": True, "max_window_layers": 1}}, "use_sliding_window = true is not"),
        ({"text_config": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}}, "rope_type 'linear' is not"),
        (
            {"text_config": {"num_key_value_heads": 3}},
            "num_attention_heads = 4 must be a multiple of num_key_value_heads",
        ),
    ],
    ids=str,
)
def test_variants_that_are_not_computed_are_refused_by_field_and_value(changes, message):
    with pytest.raises(AntgmmError, match=message) as error:
        config_with(QWEN, SHAPE, **changes)
    assert "\n" not in str(error.value)


def test_the_released_config_is_the_preset():
    """Fields of Qwen2.5-VL-3B-Instruct, as transformers 4.49 wrote them: those of the text model at the top."""
    vision = {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    vision |= {"in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112}
    vision |= {"spatial_patch_size": 14, "temporal_patch_size": 2, "fullatt_block_indexes": [7, 15, 23, 31]}
    text = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    text |= {"max_position_embeddings": 128000, "max_window_layers": 70, "sliding_window": 32768, "rope_theta": 1e6}
    text |= {"use_sliding_window": False, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    raw = {"model_type": QWEN, "image_token_id": 151655, "tie_word_embeddings": True, "vision_config": vision, **text}
    config = read_fields(raw, tied=True)
    assert config == PRESETS["qwen2.5-vl-3b"]
    # The fields that we write agree with the old ones next to them.
    ours = FAMILIES[QWEN].to_hf(config)
    merged = {**raw, **ours, "vision_config": {**vision, **ours["vision_config"]}}
    assert read_fields(merged, tied=True) == config


def test_another_processor_is_refused(case):
    with pytest.raises(AntgmmError, match="needs a Qwen2_5_VLProcessor: save one in its folder"):
        type(case.reads)(case.config, object.__new__(ProcessorMixin))
