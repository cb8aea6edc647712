"""The initial model of a training: a preset with random parameters and a new processor."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import jax
from transformers import ProcessorMixin

import pruning
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete, family, new_processor, violations
from antgmm_jax.families.common.words import IMAGE
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.files import one_line
from antgmm_jax.io.loading import CONFIG, hf_config
from antgmm_jax.presets import preset
from antgmm_jax.pure import functional
from data.record import PROMPT
from data.rows import texts
from data.source import Source
from data.tokenizer import corpus, train_tokenizer
from experiments.run.files import write_json
from experiments.run.rows.prompts import prompt_of
from experiments.run.schema import Data, Model, PreparedData, Training
from experiments.run.student import Student
from pruning.planning import variants

_TOKEN = re.compile(r"(\w+_token)_(id|index)")
"""Names of fields of config.json that name a token."""


def shape_of(recipe: Training) -> LMMConfig:
    """Returns the config of the model to train: that of its checkpoint, or its preset with the recipe's sizes.

    Args:
        recipe: the recipe.

    Returns:
        Model config; for a preset, the vocabulary will be that of the new tokenizer.

    Raises:
        AntgmmError: the preset or checkpoint does not exist, or sizes are not legal.
    """
    model = recipe.model
    return open_hf(model.path)[0] if model.path else _preset_of(model)


def _preset_of(model: Model) -> LMMConfig:
    base = preset(model.preset)
    try:
        config, *_ = variants(base, complete(base, model.sizes))
    except AntgmmError as error:
        raise AntgmmError(f"model.sizes: {error}") from None
    if broken := violations(config):
        raise AntgmmError(f"model.sizes: transformers cannot load this shape: {'; '.join(broken)}")
    return config


def make_processor(
    config: LMMConfig, data: Data | PreparedData, records: Source, template: str = PROMPT
) -> ProcessorMixin:
    """Creates the processor of a model that is trained from scratch, with a tokenizer trained on its data.

    Args:
        config: model config.
        data: data table of the recipe.
        records: training records.
        template: prompt template.

    Returns:
        Processor of the model's family; its vocabulary is at most that of the config.
    """
    vocab = config.language.vocab
    if data.kind == "maad":
        tokenizer = train_tokenizer(corpus(data.tier, template=template), vocab=vocab)
    else:
        # User data is often small, so even pairs that occur only twice become tokens.
        rows = map(records.words, range(len(records)))
        lines = (line for row in rows for line in texts(row, template))
        tokenizer = train_tokenizer(lines, vocab=vocab, min_frequency=2)
    return new_processor(config, tokenizer)


def fresh(recipe: Training, shape: LMMConfig, records: Source) -> tuple[Student, ProcessorMixin]:
    """Creates a model with random parameters and its processor.

    Args:
        recipe: the recipe.
        shape: from `shape_of`.
        records: training records.

    Returns:
        The model, with the vocabulary of the new tokenizer, and the processor.
    """
    processor = make_processor(shape, recipe.data, records, prompt_of(recipe))
    vocab = -(-len(processor.tokenizer) // 64) * 64
    language = dataclasses.replace(shape.language, vocab=vocab)
    config = dataclasses.replace(shape, language=language, image_token=IMAGE)
    begin = partial(functional(config).init, jax.random.key(recipe.seed))
    return Student(config, begin, pruning.identity(config)), processor


def save_processor(processor: ProcessorMixin, directory: Path, config: LMMConfig | None = None) -> None:
    """Saves a processor, and a config.json with the special tokens of its tokenizer.

    Args:
        processor: the processor.
        directory: folder to write; it can be the argument `like` of `save_hf`.
        config: config of its model, of which config.json may name further tokens, such as that of a video; None to
            leave them out.

    Raises:
        AntgmmError: the folder cannot be written.
    """
    with one_line(lambda: f"cannot write {directory}", "free disk space or choose another folder"):
        processor.save_pretrained(directory)
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    tokens = {name: getattr(processor.tokenizer, name) for name in names}  # None: not the default of transformers
    write_json(directory / CONFIG, {**_named_tokens(processor, config, directory), "text_config": tokens})


def _named_tokens(processor: ProcessorMixin, config: LMMConfig | None, directory: Path) -> dict[str, int]:
    """Fields at the top of a model's config.json that name tokens; the defaults are ids of released tokenizers."""
    if config is None:
        return {}
    kind = family(config).to_hf(config)["model_type"]
    matches = (_TOKEN.fullmatch(name) for name in hf_config(directory, {"model_type": kind}).to_dict())
    ids = {match[0]: getattr(processor.tokenizer, f"{match[1]}_id", None) for match in matches if match}
    return {name: token for name, token in ids.items() if token is not None}
