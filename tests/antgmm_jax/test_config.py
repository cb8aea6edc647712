"""Configs: presets have the documented sizes, tied sizes follow, local axes, initial parameters."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from antgmm_jax.axes import resize, to_dict
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete, from_dict, violations
from antgmm_jax.families.llava.presets import sized as llava
from antgmm_jax.io.convert import load_hf
from antgmm_jax.presets import PRESETS, preset
from antgmm_jax.pure import abstract, functional, local_axes
from tests import reference
from tests.marks import long

MILLIONS = {
    "antgmm-tiny": (8, 11),
    "antgmm-deep": (8, 11),
    "antgmm-small": (20, 30),
    "antgmm-300m": (280, 320),
    "antgmm-5b": (5292, 5508),
    "blip2-opt-tiny": (3, 5),
    "blip2-opt-2.7b": (3744.6, 3744.8),
    "blip2-opt-6.7b": (7752.8, 7752.9),
    "instructblip-tiny": (4, 5),
    "instructblip-llama-tiny": (5, 6),
    "instructblip-flan-t5-xl": (4022.8, 4023.0),
    "instructblip-vicuna-7b": (7913.0, 7914.0),
    "llava-tiny": (2, 4),
    **{f"llava-clip-{kind}-tiny": (3, 4) for kind in ("mistral", "qwen2", "qwen3")},
    **{f"llava-siglip-{kind}-tiny": (3, 4) for kind in ("llama", "mistral", "qwen2", "qwen3")},
    # The released checkpoint has 7063.4, with the layer of CLIP that it never runs (12.6).
    "llava-1.5-7b": (7050.7, 7050.9),
    "llava-290m": (287.6, 287.8),
    "llava-onevision-tiny": (2, 4),
    "llava-onevision-0.5b": (893, 895),
    "internvl-tiny": (2, 4),
    "internvl3-1b": (938, 939),
    "smolvlm-tiny": (2, 4),
    "smolvlm-135m": (143, 144),
    "smolvlm-256m": (250, 260),
    "qwen3-vl-tiny": (4, 5),
    # From the safetensors indexes of the released checkpoints.
    "qwen3-vl-2b": (2127.5, 2127.6),
    "qwen3-vl-4b": (4437.8, 4437.9),
    "qwen2.5-vl-tiny": (3, 4),
    "qwen2.5-vl-3b": (3754.6, 3754.7),
    "qwen2.5-vl-7b": (8292.1, 8292.2),
    "gemma3-tiny": (3, 4),
    "gemma3-4b": (4300, 4300.2),
    "gemma3-12b": (12187.2, 12187.4),
    "ministral-3-tiny": (3, 4),
    "ministral-3-3b": (3849.0, 3849.1),
    "mistral-small-3.1-24b": (24011.3, 24011.4),
}


@pytest.mark.parametrize("name", [name if "7b" in name else long(name) for name in PRESETS])
def test_presets_have_the_documented_size_and_a_legal_shape(name):
    config = preset(name)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config))) / 1e6
    low, high = MILLIONS[name]
    assert low <= count <= high
    assert violations(config) == ()


def test_the_llava_builder_gives_the_config_of_a_transformers_checkpoint(tmp_path):
    model = reference.llava(vision=(3, 32, 4, 48), text=(2, 24, 20), feature_layer=-1)
    loaded = load_hf(reference.saved(model, tmp_path / "m"))[0]
    made = llava(
        vision=(3, 32, 4, 48),
        text=(2, 24, 2, 20),
        head_dims=(8, 10),
        image=reference.IMAGE,
        patch=reference.PATCH,
        vocab=reference.VOCAB,
        image_token=reference.IMAGE_TOKEN,
        q_per_kv=2,
    )
    stack = dataclasses.replace(made.language.decoder, rope_theta=500.0)  # the value of the reference
    assert loaded == dataclasses.replace(made, language=dataclasses.replace(made.language, decoder=stack))


@pytest.fixture(scope="module", params=["blip2", "llava"])
def config(request, tmp_path_factory):
    model = getattr(reference, request.param)()
    return load_hf(reference.saved(model, tmp_path_factory.mktemp("m") / "m"))[0]


def test_local_axes_are_as_designed(config):
    local = {
        "blip2": "vision/heads vision/mlp bridge/heads bridge/cross_heads bridge/mlp encoder/mlp decoder/mlp"
        " decoder/cross_heads",
        "llava": "vision/heads vision/mlp text/heads text/mlp",
    }
    assert local_axes(config) == set(local[config.family].split())


def test_complete_adds_tied_counts(config):
    if config.family == "blip2":
        assert complete(config, {"encoder/heads": 2, "vision/embed": 16}) == {
            "encoder/heads": 2,
            "decoder/heads": 2,
            "decoder/cross_heads": 2,
            "vision/embed": 16,
            "vision/heads": 2,
        }
        with pytest.raises(AntgmmError, match="bridge/embed = 16 and bridge/heads = 3 conflict"):
            complete(config, {"bridge/embed": 16, "bridge/heads": 3})
    else:
        assert complete(config, {"text/embed": 20}) == {"text/embed": 20, "bridge/mlp": 20}
        assert violations(resize(config, {"text/embed": 22, "bridge/mlp": 22})) == (
            "text/embed = 22 must be divisible by the 4 query heads (text/heads = 2)",
        )


def test_initial_parameters_depend_on_the_key_alone(config):
    init = functional(config).init
    first, again, other = (jax.tree.leaves(init(jax.random.key(seed))) for seed in (0, 0, 1))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(first, other, strict=True))


def test_an_unknown_preset_or_axis_is_named():
    with pytest.raises(AntgmmError, match="antgmm-huge.*antgmm-tiny"):
        preset("antgmm-huge")
    with pytest.raises(AntgmmError, match="unknown axis text/depth"):
        resize(preset("antgmm-tiny"), {"text/depth": 3})


def test_records_of_older_releases_are_read():
    config = preset("internvl-tiny")
    values = to_dict(config)
    assert from_dict({**values, "language": {**values["language"], "dynamic": 2.0}}) == config
