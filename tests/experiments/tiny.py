"""Tiny teachers with processors, and recipes that take seconds, for tests of whole runs."""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from filelock import FileLock
from transformers import ProcessorMixin

import pruning
from antgmm_jax.axes import to_dict
from antgmm_jax.config import LMMConfig
from antgmm_jax.families import new_processor
from antgmm_jax.families.blip2.presets import sized as blip2_t5
from antgmm_jax.families.common.words import EOS, IMAGE, PAD
from antgmm_jax.families.gemma3.presets import sized as gemma3
from antgmm_jax.families.idefics3.presets import sized as smolvlm
from antgmm_jax.families.llava.presets import sized as llava
from antgmm_jax.families.qwen3_vl.presets import sized as qwen3_vl
from antgmm_jax.io import checkpoint
from antgmm_jax.io.convert import save_hf
from antgmm_jax.pure import Params, functional
from data.tokenizer import corpus, train_tokenizer
from experiments.run.student import teacher_key
from tests.reference import randomised

HEAD = """
calibration_batches = 1
[teacher]
path = "{teacher}"
[data]
kind = "maad"
tier = "s"
samples = 16
[loss]
soft = 1.0
[optimizer]
learning_rate = 1e-3
batch_size = 8
[evaluate]
max_new_tokens = 4
[evaluate.data]
split = "val"
samples = 8
"""
RECIPE = (
    HEAD
    + """
[export]
dtype = "float32"
[[stage]]
name = "{name}"
importance = "taylor"
mask_steps = 2
recover_steps = 2
sizes = {{ {sizes} }}
"""
)

TRAINING = """
seed = 0
checkpoint_every = 1
[model]
preset = "antgmm-tiny"
sizes = { "vision/layers" = 2, "bridge/layers" = 2, "encoder/layers" = 1, "decoder/layers" = 1 }
[data]
kind = "maad"
tier = "s"
samples = 16
[optimizer]
learning_rate = 1e-3
batch_size = 4
[evaluate]
max_new_tokens = 2
[evaluate.data]
split = "val"
samples = 2
[[phase]]
name = "facts"
kind = "facts"
steps = 3
[[phase]]
name = "answers"
kind = "answers"
steps = 3
"""

TOWERS = """
calibration_batches = 1
checkpoint_every = 2
[teacher]
path = "{teacher}"
states = ["bridge"]
[data]
kind = "maad"
tier = "s"
samples = 16
[loss]
soft = 1.0
[optimizer]
kind = "muon"
learning_rate = 1e-2
batch_size = 8
[evaluate]
max_new_tokens = 4
[evaluate.data]
split = "val"
samples = 8
[[stage]]
name = "image"
frozen = ["language"]
recover_steps = 2
loss = {{ hard = 0.0, soft = 0.0, vision = 1.0 }}
importance = "magnitude"
sizes = {{ "vision/mlp" = 16, "bridge/embed" = 16 }}
[[stage]]
name = "language"
frozen = ["vision", "bridge/stack", "bridge/norm", "bridge/queries"]
importance = "taylor"
mask_steps = 1
recover_steps = 3
sizes = {{ "decoder/mlp" = 16, "encoder/mlp" = 16, "text/embed" = 16 }}
[[stage]]
name = "whole"
repeat = "auto"
recover_steps = 2
optimizer.dtype = "bfloat16"
optimizer.remat = "full"
"""


_WORDS = {"vocab": 256, "image_token": IMAGE}


def _made_once(save: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """A `save` that creates its files once per process and writes copies of them."""

    @cache
    def files() -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            return {path.name: path.read_bytes() for path in save(Path(folder) / "model").iterdir()}

    @wraps(save)
    def written(directory: Path) -> Path:
        directory.mkdir(parents=True)
        for name, content in files().items():
            (directory / name).write_bytes(content)
        return directory

    return written


@_made_once
def save_teacher(directory: Path) -> Path:
    """Saves a BLIP-2 + T5 checkpoint with random weights and a tokenizer of MAAD-synth."""
    tokenizer = train_tokenizer(corpus("s", 200), vocab=256, min_frequency=2)
    config = blip2_t5(
        vision=(3, 32, 2, 48),
        bridge=(2, 32, 2, 48),
        text=(2, 2, 32, 2, 48),
        head_dims=(16, 16, 16),
        image=32,
        patch=16,
        queries=4,
        vocab=-(-tokenizer.get_vocab_size() // 64) * 64,
        image_token=IMAGE,
    )
    return _save(config, new_processor(config, tokenizer), directory)


@_made_once
def save_llava(directory: Path) -> Path:
    """Saves, with PyTorch, a LLaVA checkpoint with random weights and a tokenizer of MAAD-synth."""
    like = llava(vision=(3, 32, 2, 48), text=(3, 32, 4, 48), head_dims=(16, 8), image=32, patch=16, **_WORDS)
    processor = _processor(like)
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2}
    text = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    config = transformers.LlavaConfig(
        vision_config={**vision, "intermediate_size": 48, "image_size": 32, "patch_size": 16},
        text_config={
            **text,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "vocab_size": -(-len(processor.tokenizer) // 64) * 64,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
        },
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    randomised(transformers.LlavaForConditionalGeneration(config), 0).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def save_smolvlm(directory: Path) -> Path:
    """Saves a SmolVLM checkpoint with random weights; its processor splits pictures into tiles of 32 pixels."""
    config = smolvlm(
        vision=(2, 32, 2, 48),
        text=(2, 32, 2, 48),
        head_dims=(16, 16),
        image=32,
        patch=8,
        scale=2,
        vocab=320,
        image_token=IMAGE,
    )
    processor = _processor(config)
    processor.image_processor.do_image_splitting = True
    processor.image_processor.size = {"longest_edge": 64}
    return _save(config, processor, directory)


def save_gemma3(directory: Path) -> Path:
    """Saves a Gemma 3 checkpoint with random weights, of which five of six layers see the last 8 positions only."""
    config = gemma3(
        vision=(2, 32, 2, 48),
        text=(6, 32, 2, 48),
        head_dims=(16, 16),
        image=32,
        patch=8,
        side=2,
        window=8,
        vocab=320,
        image_token=IMAGE,
    )
    return _save(config, _processor(config), directory)


def save_qwen3_vl(directory: Path) -> Path:
    """Saves a Qwen3-VL checkpoint with random weights that splits a picture into at most 9 squares of 16 pixels."""
    config = qwen3_vl(
        vision=(3, 32, 2, 48),
        text=(3, 32, 2, 48),
        head_dims=(16, 16),
        taps=(0, 2),
        sections=(4, 2, 2),
        side=6,
        patch=8,
        vocab=320,
        image_token=IMAGE,
    )
    return _save(config, _processor(config), directory)


def _processor(config: LMMConfig) -> ProcessorMixin:
    """A processor with a tokenizer of MAAD-synth."""
    return new_processor(config, train_tokenizer(corpus("s", 200), vocab=256, min_frequency=2))


def _save(config: LMMConfig, processor: ProcessorMixin, directory: Path) -> Path:
    save_hf(config, jax.tree.map(np.asarray, functional(config).init(jax.random.key(0))), directory)
    like = directory.with_name("processor")
    processor.save_pretrained(like)
    for path in like.iterdir():
        shutil.copyfile(path, directory / path.name)
    return directory


def write_recipe(path: Path, teacher: Path, name: str = "blocks", sizes: str = '"vision/layers" = 2') -> Path:
    """Writes a recipe with one stage."""
    path.write_text(RECIPE.format(teacher=teacher, name=name, sizes=sizes))
    return path


def save_towers(folder: Path) -> Path:
    """Saves a teacher and `recipe.toml`: stages cut the image side, cut the language model, and distil all of it."""
    (folder / "recipe.toml").write_text(TOWERS.format(teacher=save_teacher(folder / "teacher")))
    return folder


def save_stage(folder: Path, config: LMMConfig, params: Params, keep: pruning.Keep) -> LMMConfig:
    """Saves a stage of a run that has cut a teacher to the kept units, and returns the config of its student."""
    smaller, cut = pruning.shrink(config, params, keep)
    record = {
        "config": to_dict(smaller),
        "keep": pruning.compose(pruning.identity(config), keep),
        "teacher": teacher_key(config, params),
    }
    checkpoint.save_stage(folder, {"params": cut}, record)
    return smaller


def taken(samples, rows):
    """The given rows of samples as one batch of the full shape."""
    (batch,) = samples.in_order(len(samples))
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def made_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """Returns a folder that `build` fills once for all test processes; tests must not change it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            (folder / "complete").touch()
    return folder
