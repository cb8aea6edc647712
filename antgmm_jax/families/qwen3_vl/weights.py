"""Conversion table of Qwen3-VL checkpoints."""

from antgmm_jax.families.base import Files
from antgmm_jax.families.common.llama import text_weights
from antgmm_jax.families.common.qwen import encoder_weights, merger_weights
from antgmm_jax.families.common.table import Entry, dense
from antgmm_jax.families.qwen3_vl.config import Qwen3VLConfig
from antgmm_jax.families.qwen3_vl.deepstack import MERGERS

_VISION, _TEXT = "model.visual", "model.language_model"

FILES = Files(
    head="lm_head.weight", tokens=(f"{_TEXT}.embed_tokens.weight",), ignored=(r".*rotary_(pos_)?emb\.inv_freq",)
)


def tensors(config: Qwen3VLConfig) -> list[Entry]:
    """Returns one entry for every tensor of the file (or for all layers of a stack)."""
    ours, layer = "vision/stack/blocks/mlp", f"{_VISION}.blocks.{{i}}.mlp.linear"
    return [
        *encoder_weights(config.vision, _VISION),
        Entry(f"{_VISION}.pos_embed.weight", ("vision/positions",), "p d -> p d"),
        *dense(f"{layer}_fc1", f"{ours}/up", f"{ours}/up_bias", "m e -> e m", tower="vision"),
        *dense(f"{layer}_fc2", f"{ours}/down", f"{ours}/down_bias", "e m -> m e", tower="vision"),
        *merger_weights(f"{_VISION}.merger", "bridge/merger", ("norm", "linear_fc1", "linear_fc2"), rms=False),
        *(_deepstack() if config.vision.taps else ()),
        *text_weights(config.language, _TEXT, FILES.head),
    ]


def _deepstack() -> list[Entry]:
    """Entries of DeepStack's mergers, which norm all patches of a square together."""
    hf, ours, widths = f"{_VISION}.deepstack_merger_list.{{i}}", "bridge/deepstack", "(s d) -> s d"
    return [
        Entry(f"{hf}.norm.weight", (f"{ours}/scale",), widths, MERGERS),
        Entry(f"{hf}.norm.bias", (f"{ours}/bias",), widths, MERGERS),
        *dense(f"{hf}.linear_fc1", f"{ours}/up", f"{ours}/up_bias", "m (s d) -> s d m", tower=MERGERS),
        *dense(f"{hf}.linear_fc2", f"{ours}/down", f"{ours}/down_bias", "e m -> m e", tower=MERGERS),
    ]
