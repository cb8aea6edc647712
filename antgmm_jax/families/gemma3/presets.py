"""Named Gemma 3 models, and models of given sizes."""

from antgmm_jax.config import LanguageConfig, VisionConfig
from antgmm_jax.families.common.llama import sized_decoder
from antgmm_jax.families.common.vit import sized_encoder
from antgmm_jax.families.gemma3.config import Gemma3Config, PoolConfig, gemma


def sized(
    *,
    vision: tuple[int, int, int, int],
    text: tuple[int, int, int, int],
    head_dims: tuple[int, int],
    image: int,
    patch: int,
    side: int,
    window: int,
    vocab: int,
    image_token: int,
    q_per_kv: int = 1,
    rope_factor: float = 1.0,
) -> Gemma3Config:
    """Returns a Gemma 3 config of given sizes: every sixth layer is global, the head is tied.

    Args:
        vision: sizes of SigLIP, see `antgmm_jax.families.common.vit.sized_encoder`.
        text: sizes of Gemma, see `antgmm_jax.families.common.llama.sized_decoder`.
        head_dims: head widths of SigLIP and Gemma.
        image: side of an image in pixels.
        patch: side of a patch in pixels.
        side: an image occupies `side` x `side` text positions.
        window: positions that local layers see.
        vocab: size of the token table.
        image_token: id of the image token.
        q_per_kv: query heads per key-value head.
        rope_factor: the positions of global layers are divided by it.

    Returns:
        Model config.
    """
    siglip = sized_encoder(vision, head_dims[0], act="gelu_pytorch_tanh", eps=1e-6)
    llama = sized_decoder(text, head_dims[1], q_per_kv=q_per_kv, eps=1e-6, rope_theta=1000000.0)
    decoder = gemma(
        llama,
        act="gelu_pytorch_tanh",
        scale_width=head_dims[1],
        rope_factor=rope_factor,
        window=window,
        local_layers=tuple(layer for layer in range(text[0]) if (layer + 1) % 6),
    )
    return Gemma3Config(
        vision=VisionConfig(stack=siglip, image=image, patch=patch, has_cls=False),
        bridge=PoolConfig(side=side),
        language=LanguageConfig(decoder=decoder, vocab=vocab, tied=True, scaled_tokens=True),
        image_token=image_token,
    )


_OFFICIAL = {"vision": (27, 1152, 16, 4304), "image": 896, "patch": 14, "side": 16, "window": 1024, "rope_factor": 8.0}

PRESETS: dict[str, Gemma3Config] = {
    "gemma3-tiny": sized(
        vision=(5, 128, 2, 512),
        text=(6, 192, 2, 448),
        head_dims=(64, 32),
        image=96,
        patch=12,
        side=4,
        window=32,
        vocab=1024,
        image_token=3,
        q_per_kv=3,
    ),
    "gemma3-4b": sized(
        text=(34, 2560, 4, 10240), head_dims=(72, 256), vocab=262208, image_token=262144, q_per_kv=2, **_OFFICIAL
    ),
    "gemma3-12b": sized(
        text=(48, 3840, 8, 15360), head_dims=(72, 256), vocab=262208, image_token=262144, q_per_kv=2, **_OFFICIAL
    ),
}
