"""Random tiny PyTorch models of two families: the independent reference for our models."""

from pathlib import Path

import numpy as np
import torch
import transformers

VOCAB, IMAGE_TOKEN, IMAGE, PATCH, QUERIES = 50, 49, 16, 8, 4


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with random values in every parameter: initial ones and zeros would hide a missing scale or bias."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def blip2(
    *,
    seed: int = 0,
    gated: bool = True,
    tied: bool = False,
    scaled: bool = False,
    vision: tuple[int, int, int, int] = (2, 32, 4, 48),
    bridge: tuple[int, int, int, int] = (3, 24, 3, 40),
    text: tuple[int, int, int, int, int] = (2, 2, 16, 3, 20),
    every: int = 2,
    qkv_bias: bool = True,
) -> torch.nn.Module:
    """A BLIP-2 + T5 model; sizes as in `antgmm_jax.presets.blip2_t5`."""
    config = transformers.Blip2Config(
        vision_config={
            "num_hidden_layers": vision[0],
            "hidden_size": vision[1],
            "num_attention_heads": vision[2],
            "intermediate_size": vision[3],
            "image_size": IMAGE,
            "patch_size": PATCH,
            "qkv_bias": qkv_bias,
        },
        qformer_config={
            "num_hidden_layers": bridge[0],
            "hidden_size": bridge[1],
            "num_attention_heads": bridge[2],
            "intermediate_size": bridge[3],
            "cross_attention_frequency": every,
        },
        text_config={
            "model_type": "t5",
            "num_layers": text[0],
            "num_decoder_layers": text[1],
            "d_model": text[2],
            "num_heads": text[3],
            "d_ff": text[4],
            "d_kv": 8,
            "vocab_size": VOCAB,
            "feed_forward_proj": "gated-gelu" if gated else "relu",
            "tie_word_embeddings": scaled,
            "decoder_start_token_id": 0,
        },
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    model = randomised(transformers.Blip2ForConditionalGeneration(config), seed)
    if not tied:
        head = 0.2 * torch.randn(VOCAB, text[2], generator=torch.Generator().manual_seed(seed + 1))
        model.language_model.lm_head.weight = torch.nn.Parameter(head)
    return model


def llava(
    *,
    seed: int = 0,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = False,
    vision: tuple[int, int, int, int] = (3, 32, 4, 48),
    text: tuple[int, int, int] = (2, 24, 20),
    head_dim: int = 10,
    feature_layer: int = -2,
    strategy: str = "default",
    bias: bool = False,
) -> torch.nn.Module:
    """A LLaVA model with CLIP and Llama; vision: layers, width, heads, FFN; text: layers, width, FFN."""
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "num_hidden_layers": vision[0],
            "hidden_size": vision[1],
            "num_attention_heads": vision[2],
            "intermediate_size": vision[3],
            "image_size": IMAGE,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "llama",
            "num_hidden_layers": text[0],
            "hidden_size": text[1],
            "intermediate_size": text[2],
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": VOCAB,
            "attention_bias": bias,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
        image_token_index=IMAGE_TOKEN,
        image_seq_length=QUERIES if strategy == "default" else QUERIES + 1,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )
    return randomised(transformers.LlavaForConditionalGeneration(config), seed)


def batch(model: torch.nn.Module, *, seed: int = 0, rows: int = 3, words: int = 7, pad: str = "right") -> dict:
    """A random batch of numpy arrays with the names and layouts of `transformers`, including padding."""
    rng = np.random.default_rng(seed)
    encoder_decoder = model.config.model_type == "blip-2"
    images = QUERIES + (getattr(model.config, "vision_feature_select_strategy", "default") == "full")
    ids = np.concatenate([np.full((rows, images), IMAGE_TOKEN), rng.integers(2, 48, (rows, words))], axis=1)
    mask = np.ones_like(ids)
    mask[1, -3:] = 0
    if pad == "left":
        ids = np.concatenate([ids[:, images:], ids[:, :images]], axis=1)
        mask = mask[:, ::-1].copy()
    out = {
        "pixel_values": rng.normal(size=(rows, 3, IMAGE, IMAGE)).astype(np.float32),
        "input_ids": ids,
        "attention_mask": mask,
    }
    if encoder_decoder:
        out["decoder_input_ids"] = rng.integers(0, 48, (rows, 5))
    return out


def ours(arrays: dict) -> dict:
    """The same batch in the form of our models: pictures as a tree, one per row."""
    rest = {name: array for name, array in arrays.items() if name != "pixel_values"}
    return {**rest, "images": squares(arrays["pixel_values"])}


def squares(pixels: np.ndarray) -> dict:
    """The image tree of normalised pictures [B, C, H, W]."""
    return {"pixels": np.moveaxis(pixels, 1, -1)[:, None], "valid": np.ones((len(pixels), 1), bool)}


def logits(model: torch.nn.Module, arrays: dict) -> np.ndarray:
    """PyTorch's logits, float32."""
    with torch.no_grad():
        return model(**{name: torch.from_numpy(array) for name, array in arrays.items()}).logits.float().numpy()


def valid(model: torch.nn.Module, arrays: dict) -> np.ndarray:
    """Mask of the logits to compare: tokens that are not padding; all positions of an encoder-decoder model."""
    if model.config.model_type == "blip-2":
        return np.ones(arrays["decoder_input_ids"].shape, bool)
    return arrays["attention_mask"].astype(bool)


def saved(model: torch.nn.Module, directory: Path, **kwargs) -> Path:
    """Saves the model and returns its directory."""
    model.save_pretrained(directory, **kwargs)
    return directory


def reloaded(directory: Path) -> torch.nn.Module:
    """The model of a checkpoint directory, loaded by the architecture that its config names, in float32."""
    config = transformers.AutoConfig.from_pretrained(directory)
    architecture = getattr(transformers, config.architectures[0])
    model, info = architecture.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def close(ours: np.ndarray, reference: np.ndarray) -> None:
    """Asserts a difference of at most 1e-5 times the reference's largest magnitude (at least 1e-5)."""
    np.testing.assert_allclose(ours, reference, rtol=0, atol=max(1e-5, 1e-5 * float(np.abs(reference).max())))
