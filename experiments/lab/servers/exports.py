"""A small pruned export of each family, and conversations with it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

import pruning
from antgmm_jax.config import LMMConfig
from antgmm_jax.decoding import generate
from antgmm_jax.families import FAMILIES, inputs, new_processor
from antgmm_jax.families.base import Inputs
from antgmm_jax.io.convert import save_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.pure import Params, functional
from data.tokenizer import corpus, train_tokenizer
from experiments.run.export.in_torch import stop_at, torch_answers, torch_model

SIZES: Mapping[str, float] = {
    "vision/layers": 3,
    "vision/embed": 0.5,
    "vision/mlp": 0.5,
    "text/layers": 4,
    "text/embed": 0.5,
    "text/mlp": 0.5,
}
"""What is kept of a `*-tiny` preset."""
EOS, PAD = 1, 0


class Export(NamedTuple):
    """A pruned model and its folder."""

    name: str
    directory: Path
    config: LMMConfig
    params: Params


def presets() -> dict[str, str]:
    """Returns the small presets by name, with their families."""
    return {preset: name for name, one in FAMILIES.items() for preset in one.presets if preset.endswith("-tiny")}


def pruned_export(preset: str, folder: Path) -> Export:
    """Prunes a random model in all towers and exports it with a processor.

    Args:
        preset: name of a preset.
        folder: the export is written to a folder of this name in it; an existing one is replaced.

    Returns:
        The export.
    """
    config = FAMILIES[presets()[preset]].presets[preset]
    rng = np.random.default_rng(0)
    # Larger than new parameters, so that the logits of tokens differ by much more than rounding.
    params = jax.tree.map(
        lambda x: np.asarray(x) + 0.08 * rng.standard_normal(x.shape, np.float32),
        functional(config).init(jax.random.key(0)),
    )
    keep = pruning.plan(pruning.magnitude(params, config), config, _sizes(config))
    small, small_params = pruning.shrink(config, params, keep)
    directory = folder / preset
    shutil.rmtree(directory, ignore_errors=True)
    save_hf(small, small_params, directory)
    tokenizer = train_tokenizer(corpus("s", 500), vocab=config.language.vocab - 64, min_frequency=2)
    new_processor(small, tokenizer).save_pretrained(directory)
    return Export(preset, directory, small, small_params)


def _sizes(config: LMMConfig) -> dict[str, float]:
    """`SIZES`, with the depths of T5's two stacks."""
    if config.language.encoder is None:
        return {**SIZES}
    text = {"encoder/layers": 2, "decoder/layers": 2, "decoder/mlp": 0.5}
    return {axis: size for axis, size in SIZES.items() if axis not in ("text/layers", "text/mlp")} | text


def conversations(folder: Path, processor: Any) -> list[list[dict[str, Any]]]:
    """Writes images and returns conversations about them.

    Args:
        folder: folder of the images. Every image is new: a server answers for images that it has seen from a cache.
        processor: processor of the model; without a chat template, conversations have one turn and one image.

    Returns:
        Conversations, whose images are parts with `image`, a file name.
    """
    shapes, rng = (
        [(112, 112), (90, 140), (200, 64), (64, 64), (31, 57), (120, 96), (300, 200)],
        np.random.default_rng(0),
    )
    for number, (wide, high) in enumerate(shapes):
        noise = rng.integers(0, 55, (high, wide, 3))
        ramp = np.linspace(0, 200, wide)[None, :, None]
        Image.fromarray((ramp + noise).astype(np.uint8)).save(folder / f"{number}.png")

    def user(text: str, *images: int) -> dict[str, Any]:
        parts = [{"type": "image", "image": f"{number}.png"} for number in images]
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    def said(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    single = [[user("question: what price is pictured?", number)] for number in (0, 1, 2)]
    if not processor.chat_template:
        return single
    turns = [said("system", "be brief"), user("is it wine?", 5), said("assistant", "no"), user("what is it then?", 6)]
    return [*single, [user("question: which one is red?", 3, 4)], [user("question: what is the price?")], turns]


def read(conversation: Sequence[Mapping[str, Any]], folder: Path) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Returns the messages of a conversation as the processor's template takes them, and its images."""
    messages, images = [], []
    for turn in conversation:
        parts = [{"type": "image"} if part["type"] == "image" else part for part in turn["content"]]
        messages.append({"role": turn["role"], "content": parts})
        names = [part["image"] for part in turn["content"] if part["type"] == "image"]
        images += [np.array(Image.open(folder / name).convert("RGB")) for name in names]
    return messages, images


def expected(export: Export, chats: Sequence[Sequence[Mapping[str, Any]]], tokens: int) -> list[dict[str, Any]]:
    """Answers conversations in JAX and in transformers.

    Args:
        export: the model.
        chats: conversations, from `conversations`.
        tokens: length of the answers.

    Returns:
        For each conversation its `text`, its token `ids`, the processor's `pixels` (arrays, one for each image or
        patch) and the answers `jax` and `torch`.
    """
    reads = inputs(export.config, load_processor(export.directory))
    model = torch_model(export.directory)
    stop_at(model, eos=EOS, pad=PAD)
    return [_answered(export, reads, model, chat, tokens) for chat in chats]


def _answered(
    export: Export, reads: Inputs, model: Any, chat: Sequence[Mapping[str, Any]], tokens: int
) -> dict[str, Any]:
    messages, images = read(chat, export.directory.parent)
    text = reads.chat(messages)
    ids, tree = reads(text, images)
    slots = {name: leaf[None] for name, leaf in tree.items()} | {"valid": np.ones((1, len(tree["pixels"])), bool)}
    row = {"images": slots, "input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int32)}
    given = reads.torch(row, model.config) if images else {}
    jax_answer = generate(export.config, export.params, row, max_new_tokens=tokens, eos=EOS, pad=PAD)
    return {
        "text": text,
        "ids": ids.tolist(),
        "pixels": [*given.get("pixel_values", ())],
        "jax": np.asarray(jax_answer)[0].tolist(),
        "torch": torch_answers(model, row, tokens, PAD)[0].tolist(),
    }
