"""Conversion table of BLIP-2 checkpoints."""

from antgmm_jax.config import VisionConfig
from antgmm_jax.families.blip2.config import Blip2Config
from antgmm_jax.families.common.languages import language_weights
from antgmm_jax.families.common.table import Entry, attention, dense, norm


def tensors(config: Blip2Config) -> list[Entry]:
    """Returns one entry for every tensor of the file (or for all layers of a stack)."""
    qformer = [*norm("qformer.layernorm", "bridge/norm"), *qformer_weights(config.bridge.stack.cross_every)]
    return [*vit_weights(config.vision), *qformer, *language_weights(config.language)]


def vit_weights(config: VisionConfig) -> list[Entry]:
    """Returns the conversion table of the ViT."""
    hf, layer, block = "vision_model", "vision_model.encoder.layers.{i}", "vision/stack/blocks"
    fused = tuple(f"{block}/attention/{name}" for name in "qkv")
    entries = [
        Entry(f"{hf}.embeddings.class_embedding", ("vision/cls",), "1 1 d -> d"),
        Entry(f"{hf}.embeddings.position_embedding", ("vision/positions",), "1 p d -> p d"),
        *dense(f"{hf}.embeddings.patch_embedding", "vision/patch", "vision/patch_bias", "d c y x -> c y x d"),
        *norm(f"{layer}.layer_norm1", f"{block}/norm1", "vision"),
        *norm(f"{layer}.layer_norm2", f"{block}/norm2", "vision"),
        Entry(f"{layer}.self_attn.qkv.weight", fused, "(n k d) e -> n e k d", "vision"),
        *dense(
            f"{layer}.self_attn.projection",
            f"{block}/attention/o",
            f"{block}/attention/o_bias",
            "e (k g d) -> k g d e",
            tower="vision",
        ),
        *dense(f"{layer}.mlp.fc1", f"{block}/mlp/up", f"{block}/mlp/up_bias", "m e -> e m", tower="vision"),
        *dense(f"{layer}.mlp.fc2", f"{block}/mlp/down", f"{block}/mlp/down_bias", "e m -> m e", tower="vision"),
        *norm(f"{hf}.post_layernorm", "vision/final_norm"),
    ]
    if config.stack.qkv_bias:
        biases = tuple(f"{path}_bias" for path in fused)
        entries.append(Entry(f"{layer}.self_attn.qkv.bias", biases, "(n k d) -> n k d", "vision"))
    return entries


def qformer_weights(cross_every: int) -> list[Entry]:
    """Returns the conversion table of the Q-Former, without its first norm, and of the map to the text width."""
    layer, block, cross = "qformer.encoder.layer.{i}", "bridge/stack/blocks", "bridge/stack/cross"

    def bert(hf: str, path: str, norm_path: str, every: int) -> list[Entry]:
        names = {"q": "query", "k": "key", "v": "value"}
        hf_names = {k: f"{hf}.attention.{v}" for k, v in names.items()} | {"o": f"{hf}.output.dense"}
        return attention(hf_names, path, "bridge", every, qkv_bias=True, out_bias=True) + norm(
            f"{hf}.output.LayerNorm", norm_path, "bridge", every
        )

    return [
        Entry("query_tokens", ("bridge/queries",), "1 q d -> q d"),
        *bert(f"{layer}.attention", f"{block}/attention", f"{block}/norm1", 1),
        *bert(f"{layer}.crossattention", f"{cross}/attention", f"{cross}/norm", cross_every),
        *dense(
            f"{layer}.intermediate_query.dense", f"{block}/mlp/up", f"{block}/mlp/up_bias", "m e -> e m", tower="bridge"
        ),
        *dense(
            f"{layer}.output_query.dense", f"{block}/mlp/down", f"{block}/mlp/down_bias", "e m -> m e", tower="bridge"
        ),
        *norm(f"{layer}.output_query.LayerNorm", f"{block}/norm2", "bridge"),
        *dense("language_projection", "bridge/out", "bridge/out_bias", "e d -> d e"),
    ]
