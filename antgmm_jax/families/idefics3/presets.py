"""SmolVLM models by name, and from their sizes."""

from antgmm_jax.config import LanguageConfig, StackConfig, VisionConfig
from antgmm_jax.families.idefics3.config import Idefics3Config, ShuffleConfig
from antgmm_jax.families.llama import sized_decoder


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
    """A SmolVLM model from its sizes.

    Args:
        vision: layers, embed, heads, mlp of the SigLIP tower.
        text: layers, embed, key-value heads, mlp of Llama.
        head_dims: width of a head in SigLIP and Llama; in SigLIP, heads times width is the embed.
        image: side of a tile in pixels.
        patch: patch side in pixels.
        scale: side of the squares of patches that share a text position.
        vocab: size of the token table.
        image_token: id of the placeholder token.
        q_per_kv: query heads of one key-value head.
        tied: whether the head is the token table.
        rope_theta: base of the rotary positions.

    Returns:
        The config.
    """
    siglip = StackConfig(
        layers=vision[0],
        embed=vision[1],
        heads=vision[2],
        mlp=vision[3],
        head_dim=head_dims[0],
        act="gelu_pytorch_tanh",
    )
    llama = sized_decoder(text, head_dims[1], q_per_kv=q_per_kv, eps=1e-5, rope_theta=rope_theta)
    return Idefics3Config(
        model_type="smolvlm",
        vision=VisionConfig(stack=siglip, image=image, patch=patch, has_cls=False),
        bridge=ShuffleConfig(scale=scale),
        language=LanguageConfig(decoder=llama, vocab=vocab, tied=tied),
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
