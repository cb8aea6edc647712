"""Conversion table of Qwen3-VL checkpoints."""

from antgmm_jax.families.base import Files
from antgmm_jax.families.llama import text_weights
from antgmm_jax.families.qwen3_vl.config import Qwen3VLConfig
from antgmm_jax.families.qwen3_vl.deepstack import MERGERS
from antgmm_jax.families.table import Entry, dense, norm

_VISION, _TEXT = "model.visual", "model.language_model"

FILES = Files(head="lm_head.weight", tokens=f"{_TEXT}.embed_tokens.weight", ignored=(r".*rotary_(pos_)?emb\.inv_freq",))


def tensors(config: Qwen3VLConfig) -> list[Entry]:
    """Returns one entry for every tensor of the file (or for all layers of a stack)."""
    deepstack = _merger(f"{_VISION}.deepstack_merger_list.{{i}}", "bridge/deepstack", joined=True)
    return [
        *_encoder(),
        *_merger(f"{_VISION}.merger", "bridge/merger", joined=False),
        *(deepstack if config.vision.taps else ()),
        *text_weights(config.language, _TEXT, FILES.head),
    ]


def _encoder() -> list[Entry]:
    ours, layer = "vision/stack/blocks", f"{_VISION}.blocks.{{i}}"
    fused = tuple(f"{ours}/attention/{name}" for name in "qkv")
    out, biases = f"{ours}/attention/o", tuple(f"{path}_bias" for path in fused)
    return [
        *dense(f"{_VISION}.patch_embed.proj", "vision/patch", "vision/patch_bias", "d c t y x -> c t y x d"),
        Entry(f"{_VISION}.pos_embed.weight", ("vision/positions",), "p d -> p d"),
        Entry(f"{layer}.attn.qkv.weight", fused, "(n k d) e -> n e k d", "vision"),
        Entry(f"{layer}.attn.qkv.bias", biases, "(n k d) -> n k d", "vision"),
        *dense(f"{layer}.attn.proj", out, f"{out}_bias", "e (k g d) -> k g d e", tower="vision"),
        *norm(f"{layer}.norm1", f"{ours}/norm1", "vision"),
        *norm(f"{layer}.norm2", f"{ours}/norm2", "vision"),
        *dense(f"{layer}.mlp.linear_fc1", f"{ours}/mlp/up", f"{ours}/mlp/up_bias", "m e -> e m", tower="vision"),
        *dense(f"{layer}.mlp.linear_fc2", f"{ours}/mlp/down", f"{ours}/mlp/down_bias", "e m -> m e", tower="vision"),
    ]


def _merger(hf: str, ours: str, *, joined: bool) -> list[Entry]:
    """Entries of a merger; `joined`: its norm is over all patches of a square."""
    tower, widths = (MERGERS, "(s d) -> s d") if joined else ("", "d -> d")
    return [
        Entry(f"{hf}.norm.weight", (f"{ours}/scale",), widths, tower),
        Entry(f"{hf}.norm.bias", (f"{ours}/bias",), widths, tower),
        *dense(f"{hf}.linear_fc1", f"{ours}/up", f"{ours}/up_bias", "m (s d) -> s d m", tower=tower),
        *dense(f"{hf}.linear_fc2", f"{ours}/down", f"{ours}/down_bias", "e m -> m e", tower=tower),
    ]
