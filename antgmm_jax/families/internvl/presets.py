"""Named InternVL models, and models of given sizes."""

from dataclasses import replace

from antgmm_jax.config import VisionConfig
from antgmm_jax.families.common.llama import sized_decoder
from antgmm_jax.families.common.text import TextConfig
from antgmm_jax.families.common.vit import sized_encoder
from antgmm_jax.families.internvl.config import InternVLConfig, ShuffleMergerConfig


def sized(
    *,
    vision: tuple[int, int, int, int],
    text: tuple[int, int, int, int],
    head_dims: tuple[int, int],
    image: int,
    patch: int,
    vocab: int,
    image_token: int,
    q_per_kv: int = 1,
    tied: bool = False,
    rope_theta: float = 1000000.0,
) -> InternVLConfig:
    """Returns a config with InternViT and Qwen2 of given sizes; squares of 2 x 2 patches share a text position.

    Args:
        vision: sizes of InternViT, see `antgmm_jax.families.common.vit.sized_encoder`.
        text: sizes of Qwen2, see `antgmm_jax.families.common.llama.sized_decoder`.
        head_dims: head widths of InternViT and Qwen2.
        image: side of a tile in pixels.
        patch: side of a patch in pixels.
        vocab: size of the token table.
        image_token: id of the image token.
        q_per_kv: query heads per key-value head.
        tied: whether the head shares the token table.
        rope_theta: base of the rotary positions.

    Returns:
        Model config.
    """
    intern = replace(sized_encoder(vision, head_dims[0], act="gelu", eps=1e-6), layer_scale=True)
    qwen = sized_decoder(text, head_dims[1], q_per_kv=q_per_kv, eps=1e-6, rope_theta=rope_theta)
    decoder, norms = replace(qwen, qkv_bias=True), {"final_norm": False, "has_final_norm": False}
    return InternVLConfig(
        vision=VisionConfig(stack=intern, image=image, patch=patch, keep_cls=False, **norms),
        bridge=ShuffleMergerConfig(mlp=text[1], act="gelu", scale=2),
        language=TextConfig(model_type="qwen2", decoder=decoder, vocab=vocab, tied=tied),
        image_token=image_token,
    )


PRESETS: dict[str, InternVLConfig] = {
    "internvl-tiny": sized(
        vision=(5, 128, 2, 512),
        text=(6, 192, 2, 448),
        head_dims=(64, 32),
        image=96,
        patch=12,
        vocab=1024,
        image_token=3,
        q_per_kv=3,
        tied=True,
        rope_theta=10000.0,
    ),
    "internvl3-1b": sized(
        vision=(24, 1024, 16, 4096),
        text=(24, 896, 2, 4864),
        head_dims=(64, 64),
        image=448,
        patch=14,
        vocab=151674,
        image_token=151667,
        q_per_kv=7,
    ),
}
