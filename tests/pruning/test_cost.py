"""The analytic cost against the compiled program's own count, and against the parameters themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from antgmm_jax.axes import resize
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.blip2_t5.presets import sized as blip2_t5
from antgmm_jax.functional import abstract, functional
from antgmm_jax.presets import preset
from pruning.cost import cost, forward_flops, parameters
from tests.pruning.models import CONFIGS

# XLA counts a scan's body once whatever its length, so the models have one layer a stack. They are wide enough that
# what it counts besides matrix products (norms, softmax, activations) is a few percent; they are compiled, never run.
WIDE = {
    "blip2_t5": blip2_t5(
        vision=(1, 256, 4, 1024), bridge=(1, 256, 4, 1024), text=(1, 1, 256, 4, 768), head_dims=(64, 64, 64),
        image=64, patch=8, queries=16, vocab=512, image_token=3,
    ),
    "llava": resize(CONFIGS["llava"], {
        "vision/layers": 1, "vision/embed": 256, "vision/heads": 32, "vision/mlp": 1024, "bridge/mlp": 256,
        "text/layers": 1, "text/embed": 256, "text/heads": 8, "text/mlp": 768,
    }),
}  # fmt: skip
BATCH, LENGTH, ANSWER = 2, 48, 16


def xla_flops(function, *arguments) -> float:
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def batch_of(config: LMMConfig, length: int):
    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    side = config.vision.image
    pixels = jax.ShapeDtypeStruct((BATCH, 1, side, side, 3), jnp.float32)
    images = {"pixels": pixels, "valid": jax.ShapeDtypeStruct((BATCH, 1), jnp.bool_)}
    return {"images": images, "input_ids": ints(BATCH, length), "attention_mask": ints(BATCH, length),
            "decoder_input_ids": ints(BATCH, ANSWER)}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
def test_forward_flops_are_those_of_the_compiled_program(family):
    config = WIDE[family]
    model = functional(config)
    counted = xla_flops(lambda p, b: model.apply(p, b)["logits"], abstract(config), batch_of(config, LENGTH))
    assert sum(forward_flops(config, BATCH, LENGTH, ANSWER).values()) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("family", CONFIGS)
def test_phases_are_those_of_the_compiled_engine(family):
    config = WIDE[family]
    model, params = functional(config), abstract(config)
    found = cost(config, BATCH, LENGTH, ANSWER).flops
    batch = batch_of(config, LENGTH)
    vision = xla_flops(model.features, params, batch["images"])

    def prefill(params, batch):
        return nnx.merge(model.graph, nnx.State(params)).prefill(batch, ANSWER)

    def step(params, ids, state, valid):
        language = nnx.merge(model.graph, nnx.State(params)).language
        return language.step(ids, state, valid, language.decoder.unstack())

    state, valid = jax.eval_shape(prefill, params, batch)
    counted = xla_flops(prefill, params, batch)
    # The engine runs the linear map (or projector) to the text width with the prompt, not with the image.
    projection = 2 * BATCH * 16 * 256 * 256 if family == "blip2_t5" else found["vision"]["bridge"]
    assert sum(found["vision"].values()) - projection == pytest.approx(vision, rel=0.05)
    assert sum(found["vision"].values()) + sum(found["prefill"].values()) == pytest.approx(counted, rel=0.05)
    ids = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    once = xla_flops(step, params, ids, state, valid)
    assert sum(found["decode"].values()) == pytest.approx((ANSWER - 1) * once, rel=0.05)
    caches = [leaf for leaf in jax.tree.leaves((state.caches, state.cross_caches)) if leaf is not None]
    assert cost(config, BATCH, LENGTH, ANSWER, itemsize=4).kv_cache == sum(leaf.size * 4 for leaf in caches)


def test_layers_count_linearly():
    one = CONFIGS["blip2_t5"]
    deep = resize(one, {"vision/layers": 6, "bridge/layers": 8, "encoder/layers": 6, "decoder/layers": 6})
    unit, double = (forward_flops(config, 1, 8, 4) for config in (one, deep))
    assert double["encoder"] == 2 * unit["encoder"]
    assert double["decoder"] == 2 * unit["decoder"]
    assert double["tokens"] == unit["tokens"]
    # What stands outside the stacks: the patches, and the map to the text width.
    assert 2 * unit["vision"] - double["vision"] == 2 * 4 * 3 * 8 * 8 * 24
    assert 2 * unit["bridge"] - double["bridge"] == 2 * 3 * 24 * 20


@pytest.mark.parametrize("config", [*CONFIGS.values(), preset("antgmm-tiny")], ids=["blip2_t5", "llava", "tiny"])
def test_parameters_are_counted_exactly(config):
    counted = parameters(config)
    assert sum(counted.values()) == sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(abstract(config)))
    assert counted == cost(config, 1, 8, 4).parameters
    table = config.language.vocab * config.language.decoder.embed
    assert counted["tokens"] == table * (1 if config.language.tied else 2)


def test_the_teacher_of_the_paper_is_costed_without_allocation():
    found = cost(preset("antgmm-5b"), 1, 256, 32)
    assert sum(found.parameters.values()) == pytest.approx(5.4e9, rel=0.02)
    assert list(found.flops) == list(found.bytes) == ["vision", "prefill", "decode"]
    # At batch 1 a decoder reads its parameters once a token, and computes two FLOPs for each: 1 FLOP a bfloat16 byte.
    decode = found.flops["decode"]["decoder"] / found.bytes["decode"]["decoder"]
    assert 0.7 < decode < 1.1
    # 36 layers of 32 heads of 64, keys and values, 33 own slots and 256 encoder states, bfloat16.
    assert found.kv_cache == 2 * 36 * 32 * 64 * (33 + 256) * 2


def test_a_step_of_decoding_reads_what_it_multiplies_with():
    config = preset("antgmm-5b")
    found = cost(config, 1, 256, 3)
    # Self-attention 4, the queries and outputs of cross-attention 2, a gated FFN 3; two norms and one more; 36 layers.
    layer = 4 * 2048 * 2048 + 2 * 2048 * 2048 + 3 * 2048 * 5376 + 3 * 2048
    # The table of relative positions and the last norm stand once.
    weights = 36 * layer + 32 * 32 + 2048
    assert found.bytes["decode"]["decoder"] == 2 * (2 * weights + found.kv_cache)


# No two widths alike: one that is read in the place of another would show.
COUNTED = blip2_t5(
    vision=(3, 16, 2, 20), bridge=(5, 24, 3, 28), text=(2, 4, 40, 3, 12), head_dims=(8, 8, 8), image=16, patch=8,
    queries=3, vocab=32, image_token=3,
)  # fmt: skip


def test_sublayers_of_an_encoder_decoder_model_by_hand():
    found = cost(COUNTED, 2, 7, 4).sublayers
    # The Q-Former's layers 0, 2 and 4 read the image, and each of T5's decoder its encoder: one attention more.
    assert found == {
        "vision": {"vision": 3 * 2, "bridge": 5 * 2 + 3},
        "prefill": {"encoder": 2 * 2, "decoder": 4 * 3},
        "decode": {"decoder": 3 * 4 * 3},
    }


def test_bytes_of_an_encoder_decoder_model_by_hand():
    found = cost(COUNTED, 2, 7, 4)
    # Four attention kernels and an FFN of two, all with biases; two norms.
    block = {
        "vision": 4 * (16 * 16 + 16) + (2 * 16 * 20 + 20 + 16) + 2 * 2 * 16,
        "bridge": 4 * (24 * 24 + 24) + (2 * 24 * 28 + 28 + 24) + 2 * 2 * 24,
    }
    # Patches with a bias, the class token, five positions and the last norm.
    vision = 3 * 8 * 8 * 16 + 16 + 16 + 5 * 16 + 2 * 16 + 3 * block["vision"]
    # Cross-attention's queries and outputs, its keys and values of the image's width, and its norm.
    reads = 2 * (24 * 24 + 24) + 2 * (16 * 24 + 24) + 2 * 24
    # The queries with their norm, and the map to the text.
    bridge = 3 * 24 + 2 * 24 + 24 * 40 + 40 + 5 * block["bridge"] + 3 * reads
    # T5 has no biases; a gated FFN has three kernels. Relative positions in 32 buckets and the last norm stand once.
    encoder = 2 * (4 * 40 * 24 + 3 * 40 * 12 + 2 * 40) + 32 * 3 + 40
    decoder = 4 * (8 * 40 * 24 + 3 * 40 * 12 + 3 * 40) + 32 * 3 + 40
    # Keys and values in 4 layers of 3 heads of 8: the start token and 4 of the answer, and 7 of the prompt.
    cache = 2 * 2 * 4 * 3 * 8 * (5 + 7) * 2
    assert found.kv_cache == cache
    assert found.bytes == {
        "vision": {"vision": 2 * vision, "bridge": 2 * bridge},
        "prefill": {"encoder": 2 * encoder, "decoder": 2 * decoder + cache, "tokens": 2 * 32 * 40},
        # Three steps; the encoder's states are not turned into keys and values again.
        "decode": {"decoder": 3 * (2 * (decoder - 4 * 2 * 40 * 24) + cache), "tokens": 3 * 2 * 32 * 40},
    }


def test_empty_requests_are_refused():
    with pytest.raises(AntgmmError, match="at least 1"):
        cost(CONFIGS["llava"], 1, 0, 4)
