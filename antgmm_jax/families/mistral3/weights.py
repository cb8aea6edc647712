"""Conversion table of Mistral 3 checkpoints."""

from antgmm_jax.families.base import Files
from antgmm_jax.families.common.image_side import HEAD, RENAMES, TEXT
from antgmm_jax.families.common.llama import text_weights
from antgmm_jax.families.common.table import Entry, attention, dense, norm
from antgmm_jax.families.mistral3.config import Mistral3Config

FILES = Files(
    head=HEAD,
    tokens=(f"{TEXT}.embed_tokens.weight",),
    renames=RENAMES,
    ignored=(r".*rotary_emb\.inv_freq", r".*patch_positional_embedding\.inv_freq"),
)


def tensors(config: Mistral3Config) -> list[Entry]:
    """Returns one entry for every tensor of the file (or for all layers of a stack)."""
    return [
        *_encoder(),
        *_bridge(biased=config.bridge.bias),
        *text_weights(config.language, TEXT, HEAD),
    ]


def _encoder() -> list[Entry]:
    ours, layer = "vision/stack/blocks", "vision_tower.transformer.layers.{i}"
    heads, mlp = {name: f"{layer}.attention.{name}_proj" for name in "qkvo"}, f"{layer}.feed_forward"
    return [
        Entry("vision_tower.patch_conv.weight", ("vision/patch",), "d c y x -> c 1 y x d"),
        *norm("vision_tower.ln_pre", "vision/first_norm", rms=True),
        *attention(heads, f"{ours}/attention", "vision", qkv_bias=False, out_bias=False),
        *norm(f"{layer}.attention_norm", f"{ours}/norm1", "vision", rms=True),
        *norm(f"{layer}.ffn_norm", f"{ours}/norm2", "vision", rms=True),
        *dense(f"{mlp}.gate_proj", f"{ours}/mlp/gate", None, "m e -> e m", tower="vision"),
        *dense(f"{mlp}.up_proj", f"{ours}/mlp/up", None, "m e -> e m", tower="vision"),
        *dense(f"{mlp}.down_proj", f"{ours}/mlp/down", None, "e m -> m e", tower="vision"),
    ]


def _bridge(*, biased: bool) -> list[Entry]:
    hf, biases = "multi_modal_projector", ("bridge/merger/down_bias", "bridge/down_bias") if biased else (None, None)
    return [
        *norm(f"{hf}.norm", "bridge/merger", rms=True),
        Entry(f"{hf}.patch_merger.merging_layer.weight", ("bridge/merger/up",), "u (d s) -> s d u"),
        *dense(f"{hf}.linear_1", "bridge/merger/down", biases[0], "m u -> u m"),
        *dense(f"{hf}.linear_2", "bridge/down", biases[1], "e m -> m e"),
    ]
