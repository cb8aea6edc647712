"""Named Qwen3-VL models, and models of given sizes."""

from dataclasses import replace

from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import LanguageConfig
from antgmm_jax.families.common.llama import sized_decoder
from antgmm_jax.families.common.vit import sized_encoder
from antgmm_jax.families.qwen3_vl.config import DeepStackVisionConfig, Qwen3VLConfig


def sized(
    *,
    vision: tuple[int, int, int, int],
    text: tuple[int, int, int, int],
    head_dims: tuple[int, int],
    taps: tuple[int, ...],
    sections: tuple[int, int, int],
    side: int,
    patch: int,
    vocab: int,
    image_token: int,
    q_per_kv: int = 1,
    tied: bool = False,
    rope_theta: float = 5000000.0,
) -> Qwen3VLConfig:
    """Returns a Qwen3-VL config of given sizes.

    Args:
        vision: sizes of the image encoder, see `antgmm_jax.families.common.vit.sized_encoder`.
        text: sizes of Qwen3, see `antgmm_jax.families.common.llama.sized_decoder`.
        head_dims: head widths of image encoder and Qwen3.
        taps: layers of the image encoder that DeepStack reads.
        sections: number of rotary frequencies for time, row and column.
        side: learned positions per side.
        patch: pixels per side of a patch.
        vocab: size of the token table.
        image_token: id of the image token.
        q_per_kv: query heads per key-value head.
        tied: whether the head shares the token table.
        rope_theta: base of the text's rotary positions.

    Returns:
        Model config.
    """
    encoder, inner = sized_encoder(vision, head_dims[0], act="gelu_pytorch_tanh", eps=1e-6), 4 * vision[1]
    image = DeepStackVisionConfig(
        stack=replace(encoder, positions="rope"),
        image=side * patch,
        patch=patch,
        merge=2,
        frames=2,
        entries=side**2,
        taps=taps,
        deepstack_mlp=inner if taps else 0,
    )
    qwen = sized_decoder(text, head_dims[1], q_per_kv=q_per_kv, eps=1e-6, rope_theta=rope_theta)
    return Qwen3VLConfig(
        vision=image,
        bridge=ProjectorConfig(mlp=inner, act="gelu"),
        language=LanguageConfig(decoder=replace(qwen, rope_sections=sections, qk_norm=True), vocab=vocab, tied=tied),
        image_token=image_token,
    )


_OFFICIAL = {"taps": (5, 11, 17), "sections": (24, 20, 20), "side": 48, "patch": 16, "vocab": 151936}

PRESETS: dict[str, Qwen3VLConfig] = {
    "qwen3-vl-tiny": sized(
        vision=(5, 128, 2, 512),
        text=(6, 192, 2, 448),
        head_dims=(64, 32),
        taps=(1, 3),
        sections=(6, 5, 5),
        side=8,
        patch=12,
        vocab=1024,
        image_token=3,
        q_per_kv=3,
        tied=True,
        rope_theta=10000.0,
    ),
    "qwen3-vl-2b": sized(
        vision=(24, 1024, 16, 4096),
        text=(28, 2048, 8, 6144),
        head_dims=(64, 128),
        image_token=151655,
        q_per_kv=2,
        tied=True,
        **_OFFICIAL,
    ),
    "qwen3-vl-4b": sized(
        vision=(24, 1024, 16, 4096),
        text=(36, 2560, 8, 9728),
        head_dims=(64, 128),
        image_token=151655,
        q_per_kv=4,
        tied=True,
        **_OFFICIAL,
    ),
}
