"""Conversion table of InternVL checkpoints."""

import re

from antgmm_jax.config import LMMConfig, StackConfig
from antgmm_jax.families.base import Files
from antgmm_jax.families.common.image_side import HEAD, RENAMES, TEXT
from antgmm_jax.families.common.llama import text_weights
from antgmm_jax.families.common.table import Entry, attention, dense, norm
from antgmm_jax.families.internvl.config import InternVLConfig

_LAYER = re.compile(r"vision_tower\.encoder\.layer\.(\d+)\.")


def _unread(config: LMMConfig, name: str) -> bool:
    """Whether a tensor is stored but never run: of a layer behind the one that the merger reads."""
    layer = _LAYER.match(name)
    return layer is not None and int(layer[1]) >= config.vision.stack.layers


FILES = Files(
    head=HEAD,
    tokens=(f"{TEXT}.embed_tokens.weight",),
    renames=RENAMES,
    ignored=(r".*mask_token", r".*rotary_emb\.inv_freq"),
    unread=_unread,
)


def tensors(config: InternVLConfig) -> list[Entry]:
    """Returns one entry for every tensor of the file (or for all layers of a stack)."""
    embeddings, ours, joined = "vision_tower.embeddings", "bridge/merger", "(s d) -> s d"
    return [
        Entry(f"{embeddings}.cls_token", ("vision/cls",), "1 1 d -> d"),
        Entry(f"{embeddings}.position_embeddings", ("vision/positions",), "1 p d -> p d"),
        *dense(f"{embeddings}.patch_embeddings.projection", "vision/patch", "vision/patch_bias", "d c y x -> c y x d"),
        *_layers(config.vision.stack),
        Entry("multi_modal_projector.layer_norm.weight", (f"{ours}/scale",), joined),
        Entry("multi_modal_projector.layer_norm.bias", (f"{ours}/bias",), joined),
        *dense("multi_modal_projector.linear_1", f"{ours}/up", f"{ours}/up_bias", "m (s d) -> s d m"),
        *dense("multi_modal_projector.linear_2", f"{ours}/down", f"{ours}/down_bias", "e m -> m e"),
        *text_weights(config.language, TEXT, HEAD),
    ]


def _layers(stack: StackConfig) -> list[Entry]:
    """Entries of the image encoder's layers."""
    ours, hf, rms = "vision/stack/blocks", "vision_tower.encoder.layer.{i}", stack.norm == "rms"
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "projection_layer"}
    heads = {short: f"{hf}.attention.{name}" for short, name in names.items()}
    return [
        *attention(heads, f"{ours}/attention", "vision", qkv_bias=stack.qkv_bias, out_bias=True),
        *norm(f"{hf}.layernorm_before", f"{ours}/norm1", "vision", rms=rms),
        *norm(f"{hf}.layernorm_after", f"{ours}/norm2", "vision", rms=rms),
        Entry(f"{hf}.lambda_1", (f"{ours}/after1/scale",), "d -> d", "vision"),
        Entry(f"{hf}.lambda_2", (f"{ours}/after2/scale",), "d -> d", "vision"),
        *dense(f"{hf}.mlp.fc1", f"{ours}/mlp/up", f"{ours}/mlp/up_bias", "m e -> e m", tower="vision"),
        *dense(f"{hf}.mlp.fc2", f"{ours}/mlp/down", f"{ours}/mlp/down_bias", "e m -> m e", tower="vision"),
    ]
