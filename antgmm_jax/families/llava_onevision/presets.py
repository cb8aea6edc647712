"""Named LLaVA-OneVision models, and models of given sizes."""

from dataclasses import replace

from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import VisionConfig
from antgmm_jax.families.common.llama import sized_decoder
from antgmm_jax.families.common.text import TextConfig
from antgmm_jax.families.common.vit import sized_encoder
from antgmm_jax.families.llava_onevision.config import LlavaOnevisionConfig


def sized(
    *,
    vision: tuple[int, int, int, int],
    text: tuple[int, int, int, int],
    head_dims: tuple[int, int],
    image: int,
    patch: int,
    most_side: int,
    most_tiles: int,
    vocab: int,
    image_token: int,
    q_per_kv: int = 1,
    tied: bool = False,
    rope_theta: float = 1000000.0,
) -> LlavaOnevisionConfig:
    """Returns a config with SigLIP and Qwen2 of given sizes.

    Args:
        vision: sizes of SigLIP, see `antgmm_jax.families.common.vit.sized_encoder`.
        text: sizes of Qwen2, see `antgmm_jax.families.common.llama.sized_decoder`.
        head_dims: head widths of SigLIP and Qwen2.
        image: side of a tile in pixels.
        patch: side of a patch in pixels.
        most_side: largest number of tiles along one side of an image.
        most_tiles: limit of an image's tokens, in tiles.
        vocab: size of the token table.
        image_token: id of the image token.
        q_per_kv: query heads per key-value head.
        tied: whether the head shares the token table.
        rope_theta: base of the rotary positions.

    Returns:
        Model config.
    """
    siglip = sized_encoder(vision, head_dims[0], act="gelu_pytorch_tanh", eps=1e-6)
    qwen = sized_decoder(text, head_dims[1], q_per_kv=q_per_kv, eps=1e-6, rope_theta=rope_theta)
    decoder, sides = replace(qwen, qkv_bias=True), range(image, (most_side + 1) * image, image)
    return LlavaOnevisionConfig(
        vision=VisionConfig(stack=siglip, image=image, patch=patch, final_norm=False, has_cls=False),
        bridge=ProjectorConfig(mlp=text[1], act="gelu"),
        language=TextConfig(model_type="qwen2", decoder=decoder, vocab=vocab, tied=tied),
        image_token=image_token,
        resolutions=tuple((high, wide) for high in sides for wide in sides),
        most_tiles=most_tiles,
    )


PRESETS: dict[str, LlavaOnevisionConfig] = {
    "llava-onevision-tiny": sized(
        vision=(5, 128, 2, 512),
        text=(6, 192, 2, 448),
        head_dims=(64, 32),
        image=96,
        patch=24,
        most_side=2,
        most_tiles=9,
        vocab=1024,
        image_token=3,
        q_per_kv=3,
        tied=True,
        rope_theta=10000.0,
    ),
    "llava-onevision-0.5b": sized(
        vision=(26, 1152, 16, 4304),
        text=(24, 896, 2, 4864),
        head_dims=(72, 64),
        image=384,
        patch=14,
        most_side=6,
        most_tiles=9,
        vocab=152000,
        image_token=151646,
        q_per_kv=7,
        tied=True,
    ),
}
