"""Named SmolVLM models, and models of given sizes."""

from antgmm_jax.config import VisionConfig
from antgmm_jax.families.common.llama import sized_decoder
from antgmm_jax.families.common.text import TextConfig
from antgmm_jax.families.common.vit import sized_encoder
from antgmm_jax.families.idefics3.config import Idefics3Config, ShuffleConfig


def sized(
    *,
    vision: tuple[int, int, int, int],
    text: tuple[int, int, int, int],
    head_dims: tuple[int, int],
    image: int,
    patch: int,
    scale: int,
    vocab: int,
    image_token: int,
    q_per_kv: int = 1,
    tied: bool = False,
    rope_theta: float = 100000.0,
) -> Idefics3Config:
    """Returns a SmolVLM config of given sizes.

    Args:
        vision: sizes of SigLIP, see `antgmm_jax.families.common.vit.sized_encoder`.
        text: sizes of Llama, see `antgmm_jax.families.common.llama.sized_decoder`.
        head_dims: head widths of SigLIP and Llama.
        image: side of a tile in pixels.
        patch: side of a patch in pixels.
        scale: `scale` x `scale` patches share one text position.
        vocab: size of the token table.
        image_token: id of the image token.
        q_per_kv: query heads per key-value head.
        tied: whether the head shares the token table.
        rope_theta: base of the rotary positions.

    Returns:
        Model config.
    """
    siglip = sized_encoder(vision, head_dims[0], act="gelu_pytorch_tanh", eps=1e-6)
    llama = sized_decoder(text, head_dims[1], q_per_kv=q_per_kv, eps=1e-5, rope_theta=rope_theta)
    return Idefics3Config(
        model_type="smolvlm",
        vision=VisionConfig(stack=siglip, image=image, patch=patch, has_cls=False),
        bridge=ShuffleConfig(scale=scale),
        language=TextConfig(decoder=llama, vocab=vocab, tied=tied),
        image_token=image_token,
    )


PRESETS: dict[str, Idefics3Config] = {
    "smolvlm-tiny": sized(
        vision=(5, 128, 2, 512),
        text=(6, 192, 2, 448),
        head_dims=(64, 32),
        image=96,
        patch=12,
        scale=2,
        vocab=1024,
        image_token=3,
        q_per_kv=3,
        tied=True,
    ),
    # SmolLM2-135M, and an image side for MAAD-synth's tier m.
    "smolvlm-135m": sized(
        vision=(12, 256, 8, 768),
        text=(30, 576, 3, 1536),
        head_dims=(32, 64),
        image=112,
        patch=28,
        scale=1,
        vocab=49216,
        image_token=49152,
        q_per_kv=3,
        tied=True,
    ),
    "smolvlm-256m": sized(
        vision=(12, 768, 12, 3072),
        text=(30, 576, 3, 1536),
        head_dims=(64, 64),
        image=512,
        patch=16,
        scale=4,
        vocab=49280,
        image_token=49190,
        q_per_kv=3,
    ),
}
