"""The model that a training begins with: a preset's, with random parameters and a processor made for its data."""

import dataclasses
from pathlib import Path

import jax
from transformers import ProcessorMixin

from antgmm_jax.axes import resize
from antgmm_jax.config import LMMConfig, towers
from antgmm_jax.convert import open_hf
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete, new_processor, violations
from antgmm_jax.families.words import IMAGE
from antgmm_jax.functional import functional
from antgmm_jax.presets import preset
from data.record import PROMPT, prompt
from data.source import Source
from data.tokenizer import corpus, train_tokenizer
from experiments.run.folder import write_json
from experiments.run.prompts import prompt_of
from experiments.run.schema import Data, Model, Training
from experiments.run.student import Student, whole


def shape_of(recipe: Training) -> LMMConfig:
    """The model that a recipe trains: its checkpoint's, or its preset with the recipe's sizes laid over it.

    Args:
        recipe: the recipe.

    Returns:
        The config; of a preset's, the tokenizer will yet decide the vocabulary.

    Raises:
        AntgmmError: no such preset or checkpoint, sizes that no model of its family has, or a phase that it cannot
            take.
    """
    model = recipe.model
    config = open_hf(model.path)[0] if model.path else _preset_of(model)
    facts = [phase.name for phase in recipe.phases if phase.kind == "facts"]
    if facts and "bridge" not in towers(config):
        raise AntgmmError(
            f"phase {facts[0]!r} trains a bridge with a stack, which {model.path or model.preset} lacks: "
            "give it phases of kind answers"
        )
    return config


def _preset_of(model: Model) -> LMMConfig:
    base = preset(model.preset)
    try:
        config = resize(base, complete(base, model.sizes))
    except AntgmmError as error:
        raise AntgmmError(f"model.sizes: {error}") from None
    if broken := violations(config):
        raise AntgmmError(f"model.sizes: transformers cannot serve this shape: {'; '.join(broken)}")
    return config


def make_processor(config: LMMConfig, data: Data, records: Source, template: str = PROMPT) -> ProcessorMixin:
    """The processor of a model that is trained from scratch, with a tokenizer of its data.

    Args:
        config: the model.
        data: where the records come from.
        records: what it is trained on.
        template: of the prompts.

    Returns:
        A processor of the model's family, with at most the config's number of tokens.
    """
    vocab = config.language.vocab
    if data.kind == "maad":
        tokenizer = train_tokenizer(corpus(data.tier, template=template), vocab=vocab)
    else:
        # A user's few rows repeat little: what occurs twice is worth a token.
        rows = map(records.words, range(len(records)))
        texts = (text for row in rows for text in (prompt(row.question, row.text, template), row.answer))
        tokenizer = train_tokenizer(texts, vocab=vocab, min_frequency=2)
    return new_processor(config, tokenizer)


def fresh(recipe: Training, shape: LMMConfig, records: Source) -> tuple[Student, ProcessorMixin]:
    """A model with random parameters, and its processor.

    Args:
        recipe: the recipe.
        shape: from `shape_of`.
        records: what it is trained on.

    Returns:
        The model, with the vocabulary of a tokenizer of the data, and the processor.
    """
    processor = make_processor(shape, recipe.data, records, prompt_of(recipe))
    vocab = -(-len(processor.tokenizer) // 64) * 64
    language = dataclasses.replace(shape.language, vocab=vocab)
    config = dataclasses.replace(shape, language=language, image_token=IMAGE)
    return whole(config, functional(config).init(jax.random.key(recipe.seed))), processor


def save_processor(processor: ProcessorMixin, directory: Path) -> None:
    """A processor's files, and a config.json that tells `transformers` the special tokens of its tokenizer.

    Args:
        processor: the processor.
        directory: where to; what `save_hf` takes as `like`.
    """
    processor.save_pretrained(directory)
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    found = {name: getattr(processor.tokenizer, name) for name in names}
    tokens = {name: token for name, token in found.items() if token is not None}
    write_json(directory / "config.json", {"text_config": tokens})
