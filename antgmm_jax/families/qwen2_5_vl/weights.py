"""Conversion table of Qwen2.5-VL checkpoints."""

from antgmm_jax.families.base import Files
from antgmm_jax.families.common.llama import text_weights
from antgmm_jax.families.common.qwen import encoder_weights, merger_weights
from antgmm_jax.families.common.table import Entry, dense
from antgmm_jax.families.qwen2_5_vl.config import Qwen25VLConfig

# Tensor names of the releases on the Hub, which vLLM and every release of transformers read.
FILES = Files(
    head="lm_head.weight",
    tokens=("model.embed_tokens.weight",),
    renames=((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),
    ignored=(r".*rotary_(pos_)?emb\.inv_freq",),
)


def tensors(config: Qwen25VLConfig) -> list[Entry]:
    """Returns one entry for every tensor of the file (or for all layers of a stack)."""
    mlps = {"gate": "m e -> e m", "up": "m e -> e m", "down": "e m -> m e"}
    ours, layer = "vision/stack/blocks/mlp", "visual.blocks.{i}.mlp"
    return [
        *encoder_weights(config.vision, "visual"),
        *(
            entry
            for name, pattern in mlps.items()
            for entry in dense(f"{layer}.{name}_proj", f"{ours}/{name}", f"{ours}/{name}_bias", pattern, tower="vision")
        ),
        *merger_weights("visual.merger", "bridge/merger", ("ln_q", "mlp.0", "mlp.2"), rms=True),
        *text_weights(config.language, "model", FILES.head),
    ]
