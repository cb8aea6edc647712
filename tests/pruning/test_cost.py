"""Parameters, FLOPs and bytes of models equal values computed by hand."""

import logging

import jax
import pytest

from antgmm_jax.axes import resize
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.blip2.presets import sized as blip2_t5
from antgmm_jax.families.qwen3_vl.presets import sized as qwen3_vl
from antgmm_jax.parallel import sharding
from antgmm_jax.presets import preset
from pruning import costs
from pruning.costs import cost, forward_flops
from tests.pruning.models import CONFIGS


def test_flops_are_linear_in_layers():
    one = CONFIGS["blip2_t5"]
    deep = resize(one, {"vision/layers": 6, "bridge/layers": 8, "encoder/layers": 6, "decoder/layers": 6})
    unit, double = (forward_flops(config, 1, 8, 4) for config in (one, deep))
    assert double["encoder"] == 2 * unit["encoder"]
    assert double["decoder"] == 2 * unit["decoder"]
    assert double["tokens"] == unit["tokens"]
    # Outside the stacks: the patch embedding, and the map to the text width.
    assert 2 * unit["vision"] - double["vision"] == 2 * 4 * 3 * 8 * 8 * 24
    assert 2 * unit["bridge"] - double["bridge"] == 2 * 3 * 24 * 20


def test_cost_of_the_papers_teacher_by_hand():
    computed = cost(preset("antgmm-5b"), 1, 256, 32)
    assert sum(computed.parameters.values()) == pytest.approx(5.4e9, rel=0.02)
    assert list(computed.flops) == list(computed.bytes) == ["vision", "prefill", "decode"]
    # At batch 1 a decoder reads each parameter once per token and computes two FLOPs with it: 1 FLOP per bfloat16 byte.
    decode = computed.flops["decode"]["decoder"] / computed.bytes["decode"]["decoder"]
    assert 0.7 < decode < 1.1
    # 36 layers of 32 heads of 64, keys and values, 33 decoder slots and 256 encoder states, bfloat16.
    assert computed.kv_cache == 2 * 36 * 32 * 64 * (33 + 256) * 2


def test_each_decoding_step_reads_weights_and_cache():
    config = preset("antgmm-5b")
    computed = cost(config, 1, 256, 3)
    # Self-attention 4, the queries and outputs of cross-attention 2, a gated FFN 3; two norms and one more; 36 layers.
    layer = 4 * 2048 * 2048 + 2 * 2048 * 2048 + 3 * 2048 * 5376 + 3 * 2048
    # The table of relative positions and the last norm occur once.
    weights = 36 * layer + 32 * 32 + 2048
    assert computed.bytes["decode"]["decoder"] == 2 * (2 * weights + computed.kv_cache)


# All widths differ, so that a mix-up changes the result.
COUNTED = blip2_t5(
    vision=(3, 16, 2, 20), bridge=(5, 24, 3, 28), text=(2, 4, 40, 3, 12), head_dims=(8, 8, 8), image=16, patch=8,
    queries=3, vocab=32, image_token=3,
)  # fmt: skip


def test_sublayers_of_an_encoder_decoder_model_by_hand():
    sublayers = cost(COUNTED, 2, 7, 4).sublayers
    # Layers 0, 2 and 4 of the Q-Former, and all layers of T5's decoder, have an additional cross-attention.
    assert sublayers == {
        "vision": {"vision": 3 * 2, "bridge": 5 * 2 + 3},
        "prefill": {"encoder": 2 * 2, "decoder": 4 * 3},
        "decode": {"decoder": 3 * 4 * 3},
    }


def test_bytes_of_an_encoder_decoder_model_by_hand():
    computed = cost(COUNTED, 2, 7, 4)
    # Four attention kernels and an FFN of two, all with biases; two norms.
    block = {
        "vision": 4 * (16 * 16 + 16) + (2 * 16 * 20 + 20 + 16) + 2 * 2 * 16,
        "bridge": 4 * (24 * 24 + 24) + (2 * 24 * 28 + 28 + 24) + 2 * 2 * 24,
    }
    # Patches with a bias, the class token, five positions and the last norm.
    vision = 3 * 8 * 8 * 16 + 16 + 16 + 5 * 16 + 2 * 16 + 3 * block["vision"]
    # Cross-attention: queries and outputs, keys and values of the image's width, and a norm.
    reads = 2 * (24 * 24 + 24) + 2 * (16 * 24 + 24) + 2 * 24
    # The queries with their norm, and the map to the text.
    bridge = 3 * 24 + 2 * 24 + 24 * 40 + 40 + 5 * block["bridge"] + 3 * reads
    # T5 has no biases; a gated FFN has three kernels. Relative positions in 32 buckets and the last norm occur once.
    encoder = 2 * (4 * 40 * 24 + 3 * 40 * 12 + 2 * 40) + 32 * 3 + 40
    decoder = 4 * (8 * 40 * 24 + 3 * 40 * 12 + 3 * 40) + 32 * 3 + 40
    # Keys and values in 4 layers of 3 heads of 8: the start token and 4 of the answer, and 7 of the prompt.
    cache = 2 * 2 * 4 * 3 * 8 * (5 + 7) * 2
    assert computed.kv_cache == cache
    assert computed.bytes == {
        "vision": {"vision": 2 * vision, "bridge": 2 * bridge},
        "prefill": {"encoder": 2 * encoder, "decoder": 2 * decoder + cache, "tokens": 2 * 32 * 40},
        # Three steps; keys and values of the encoder's states are computed once.
        "decode": {"decoder": 3 * (2 * (decoder - 4 * 2 * 40 * 24) + cache), "tokens": 3 * 2 * 32 * 40},
    }


def test_empty_requests_are_refused():
    with pytest.raises(AntgmmError, match="at least 1"):
        cost(CONFIGS["llava"], 1, 0, 4)


def test_counting_parameters_warns_of_no_sharding(monkeypatch, caplog):
    """The model of units of size 1 that is traced for it is placed nowhere."""
    monkeypatch.setattr(sharding, "_warned", set())
    costs._unit_arrays.cache_clear()
    costs.total_parameters.cache_clear()
    with jax.set_mesh(sharding.make_mesh(fsdp=8)), caplog.at_level(logging.WARNING):
        assert costs.total_parameters(CONFIGS["llava"]) > 0
    assert caplog.messages == []


def test_slots_that_are_encoded_alone_cost_as_much_each():
    config = CONFIGS["llava"]
    one, usual = (cost(config, 1, 9, 4, slots=slots).flops for slots in (1, None))
    assert one == usual
    more = cost(config, 1, 9, 4, slots=2.5).flops
    assert more["vision"] == {tower: pytest.approx(2.5 * flops) for tower, flops in one["vision"].items()}
    assert {**more, "vision": {}} == {**one, "vision": {}}
    assert sum(cost(config, 1, 9, 4, slots=0).flops["vision"].values()) == 0


def test_slots_of_a_grid_attend_to_one_another():
    config = qwen3_vl(
        vision=(3, 32, 2, 48), text=(3, 32, 2, 48), head_dims=(16, 16), taps=(0, 2), sections=(4, 2, 2), side=6,
        patch=8, vocab=320, image_token=3,
    )  # fmt: skip
    zero, usual, double, triple = (cost(config, 1, 9, 4, slots=n * config.slots).flops["vision"] for n in range(4))
    assert config.slots > 1 and usual == cost(config, 1, 9, 4).flops["vision"] and not any(zero.values())
    assert double["bridge"] == 2 * usual["bridge"]
    # A linear and a quadratic part.
    assert triple["vision"] - 3 * double["vision"] + 3 * usual["vision"] == 0
    assert double["vision"] > 2 * usual["vision"]


def test_local_layers_attend_to_a_window_by_hand():
    config = preset("qwen2.5-vl-3b")
    heads, slots = 16 * 80, config.slots

    def attention(slots):
        """What is not linear in slots, from three points of a quadratic function."""
        one, two, three = (cost(config, 1, 9, 4, slots=n * slots).flops["vision"]["vision"] for n in (1, 2, 3))
        return (three - 2 * two + one) / 2

    # Four layers of 32 see all patches, four a slot; the others 64, which is linear.
    assert attention(slots) == pytest.approx(4 * heads * 4 * (4 * slots) ** 2)
    text = preset("gemma3-4b")
    far, near = text.language.decoder, sum(text.language.decoder.is_local)
    assert far.window == 1024 and 0 < near < far.layers
    short, long = (forward_flops(text, 1, length)["text"] for length in (1024, 2048))
    # Twice the tokens and twice the keys; layers of the window see no more keys.
    more = 4 * 1024 * far.q_per_kv * far.heads * far.head_dim * 2048 * (far.layers - near)
    assert long - 2 * short == more
