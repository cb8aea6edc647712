"""Conversion table of InstructBLIP checkpoints."""

from antgmm_jax.families.blip2.weights import qformer_weights, vit_weights
from antgmm_jax.families.common.languages import language_weights
from antgmm_jax.families.common.table import Entry, dense, norm
from antgmm_jax.families.instructblip.config import InstructBlipConfig


def tensors(config: InstructBlipConfig) -> list[Entry]:
    """Returns one entry for every tensor of the file (or for all layers of a stack)."""
    read = qformer_weights(config.bridge.stack.cross_every)
    return [*vit_weights(config.vision), *_text(), *read, *language_weights(config.language)]


def _text() -> list[Entry]:
    """What the Q-Former has for the instruction."""
    hf, layer, block = "qformer.embeddings", "qformer.encoder.layer.{i}", "bridge/stack/blocks"
    mlp = f"{block}/text_mlp"
    return [
        Entry(f"{hf}.word_embeddings.weight", ("bridge/words",), "v d -> v d"),
        Entry(f"{hf}.position_embeddings.weight", ("bridge/positions",), "p d -> p d"),
        *norm(f"{hf}.layernorm", "bridge/norm"),
        *dense(f"{layer}.intermediate.dense", f"{mlp}/up", f"{mlp}/up_bias", "m e -> e m", tower="bridge"),
        *dense(f"{layer}.output.dense", f"{mlp}/down", f"{mlp}/down_bias", "e m -> m e", tower="bridge"),
        *norm(f"{layer}.output.LayerNorm", f"{block}/text_norm", "bridge"),
    ]
