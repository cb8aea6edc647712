"""What the vision-language models of the Qwen series share: image encoder, mergers and text positions."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Array

from antgmm_jax.blocks.block import Gates
from antgmm_jax.blocks.grids import token_places
from antgmm_jax.blocks.language import Embedded
from antgmm_jax.blocks.packed import PackedVisionConfig
from antgmm_jax.config import StackConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.table import Entry, dense, norm
from antgmm_jax.lmm import LMM, Batch


class QwenVL(LMM):
    """A model with text positions in three dimensions."""

    def inputs(self, batch: Batch, gates: Gates, collect: Sequence[str] = ()) -> tuple[Embedded, dict[str, Array]]:
        """Embeds the prompt, with image states in place of the image tokens, and computes positions."""
        tokens, kept = super().inputs(batch, gates, collect)
        images = batch["images"]
        if images["valid"].shape[1] == 0:
            return tokens, kept
        mask = batch["attention_mask"].astype(bool)
        token, segments = self.config.image_token, batch.get("segment_ids")
        return tokens._replace(places=token_places(batch["input_ids"], mask, images["place"], token, segments)), kept


def check(vision: Mapping[str, Any], text: Mapping[str, Any], raw: Mapping[str, Any], head_dim: int) -> None:
    """Refuses inconsistent configs and variants that are not supported.

    Args:
        vision: `vision_config` including its defaults.
        text: `text_config` including its defaults.
        raw: config.json as written.
        head_dim: width of a text head.

    Raises:
        AntgmmError: names the field, its value and what would work.
    """
    if text["model_type"] != (wanted := f"{raw['model_type']}_text"):
        raise AntgmmError(f"text_config.model_type = {text['model_type']!r} is not supported: it must be {wanted!r}")
    rope = text["rope_parameters"]
    if rope.get("rope_type", "default") != "default":
        raise AntgmmError(f"rope_type {rope['rope_type']!r} is not supported: it must be 'default'")
    sections = rope.get("mrope_section")
    if sections is None or len(sections) != 3 or sum(sections) != head_dim // 2:
        raise AntgmmError(
            f"rope_parameters.mrope_section = {sections} must be three numbers that sum to head_dim / 2 ="
            f" {head_dim // 2}"
        )
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(vision[name], int):
            raise AntgmmError(f"vision_config.{name} = {vision[name]}: it must be one number")
    head = vision["hidden_size"] // vision["num_heads"]
    if vision["hidden_size"] % vision["num_heads"] or head % 4:
        raise AntgmmError(
            f"vision_config.hidden_size = {vision['hidden_size']} must be num_heads = {vision['num_heads']} times a"
            " multiple of 4"
        )
    if vision["out_hidden_size"] != text["hidden_size"]:
        raise AntgmmError(
            f"vision_config.out_hidden_size = {vision['out_hidden_size']} must be text_config.hidden_size ="
            f" {text['hidden_size']}"
        )


def check_layers(name: str, indices: Sequence[int], depth: int) -> None:
    """Checks that the indices in a field of `vision_config` ascend and exist: transformers ignores those that do not.

    Raises:
        AntgmmError: they do not.
    """
    if [*indices] != sorted(set(indices)) or not all(0 <= layer < depth for layer in indices):
        raise AntgmmError(f"vision_config.{name} = {[*indices]} must ascend within 0..{depth - 1}, as depth = {depth}")


def encoder_of(vision: Mapping[str, Any]) -> StackConfig:
    """Converts a `vision_config` (with its defaults) to the image encoder's stack."""
    return StackConfig(
        layers=vision["depth"],
        embed=vision["hidden_size"],
        heads=vision["num_heads"],
        head_dim=vision["hidden_size"] // vision["num_heads"],
        mlp=vision["intermediate_size"],
        act=vision["hidden_act"],
        positions="rope",
        rope_theta=float(vision["rope_parameters"]["rope_theta"]),
    )


def vision_fields(vision: PackedVisionConfig, text: StackConfig) -> dict[str, Any]:
    """Returns the fields of `vision_config` that depend on the model's shape."""
    return {
        "depth": vision.stack.layers,
        "hidden_size": vision.stack.embed,
        "hidden_act": vision.stack.act,
        "intermediate_size": vision.stack.mlp,
        "num_heads": vision.stack.heads,
        "in_channels": vision.channels,
        "patch_size": vision.patch,
        "spatial_merge_size": vision.merge,
        "temporal_patch_size": vision.frames,
        "out_hidden_size": text.embed,
        "rope_parameters": {"rope_type": "axial", "rope_theta": vision.stack.rope_theta},
    }


def encoder_weights(vision: PackedVisionConfig, model: str) -> list[Entry]:
    """Returns the conversion table of an image encoder with prefix `model`, without its MLPs."""
    ours, layer, rms = "vision/stack/blocks", f"{model}.blocks.{{i}}", vision.stack.norm == "rms"
    fused = tuple(f"{ours}/attention/{name}" for name in "qkv")
    out, biases = f"{ours}/attention/o", tuple(f"{path}_bias" for path in fused)
    bias = "vision/patch_bias" if vision.patch_bias else None
    return [
        *dense(f"{model}.patch_embed.proj", "vision/patch", bias, "d c t y x -> c t y x d"),
        Entry(f"{layer}.attn.qkv.weight", fused, "(n k d) e -> n e k d", "vision"),
        Entry(f"{layer}.attn.qkv.bias", biases, "(n k d) -> n k d", "vision"),
        *dense(f"{layer}.attn.proj", out, f"{out}_bias", "e (k g d) -> k g d e", tower="vision"),
        *norm(f"{layer}.norm1", f"{ours}/norm1", "vision", rms=rms),
        *norm(f"{layer}.norm2", f"{ours}/norm2", "vision", rms=rms),
    ]


def merger_weights(hf: str, ours: str, names: tuple[str, str, str], *, rms: bool) -> list[Entry]:
    """Returns the conversion table of a merger that is normed patch by patch; `names` are those of its layers."""
    scale, up, down = (f"{hf}.{name}" for name in names)
    return [
        *norm(scale, ours, rms=rms),
        *dense(up, f"{ours}/up", f"{ours}/up_bias", "m (s d) -> s d m"),
        *dense(down, f"{ours}/down", f"{ours}/down_bias", "e m -> m e"),
    ]
