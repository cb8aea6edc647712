"""Random small PyTorch models of every family, our models loaded from their files, and batches for both."""

import copy
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from antgmm_jax.blocks.grids import places
from antgmm_jax.config import LMMConfig
from antgmm_jax.families import FAMILIES, family, family_of, inputs, new_processor
from antgmm_jax.families.base import Inputs
from antgmm_jax.families.common.words import SPECIAL
from antgmm_jax.families.llava_onevision.config import LlavaOnevisionConfig
from antgmm_jax.families.llava_onevision.inputs import place_of
from antgmm_jax.io.convert import open_hf
from antgmm_jax.pure import functional

Shape = tuple[str, str]
"""Name of a family and name of one of its small shapes."""
SHAPES: list[Shape] = [(name, shape) for name, family in FAMILIES.items() for shape in family.tiny(0)]
FIRST = [
    (name, shape)
    for name, family in FAMILIES.items()
    for place, (shape, tiny) in enumerate(family.tiny(0).items())
    if place == 0 or tiny.another
]
QUICK = [one for one in FIRST if one[0] in ("llava", "qwen2_5_vl", "gemma3")]
"""One size of pictures, and any size with windows; layers that attend to their surroundings."""
PICTURES = (2, 0, 1, 2)
"""Number of pictures in each row of a batch."""
WORDS = (20, 60)
"""Ids of plain words."""


class Case(NamedTuple):
    """A shape of a family: the PyTorch model, its directory, and our model loaded from it.

    Attributes:
        model: with random parameters, float32.
        directory: as `save_pretrained` writes it.
        config: ours.
        params: ours, numpy.
        reads: the family's inputs.
    """

    model: torch.nn.Module
    directory: Path
    config: LMMConfig
    params: dict
    reads: Inputs


@cache
def case_of(family: str, shape: str, root: Path) -> Case:
    """Returns the case of a family's shape, created once below `root`."""
    fields, own_head, _ = FAMILIES[family].tiny(0)[shape]
    hf = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    model = _randomised(getattr(transformers, fields["architectures"][0])(hf), own_head)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    directory = root / "families" / family / shape
    model.save_pretrained(directory)
    config, params = open_hf(directory)
    params = jax.tree.map(np.asarray, params)  # NumPy gathers without compiling a program for each shape
    return Case(model, directory, config, params, inputs(config, new_processor(config, tokenizer())))


def read_fields(fields: dict[str, Any], *, tied: bool = False) -> LMMConfig:
    """The config of a model from the contents of its config.json."""
    hf = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(copy.deepcopy(fields)).to_dict()
    return family_of(fields["model_type"]).from_hf(hf, fields, tied=tied)


def config_with(family: str, shape: str, **changes: Any) -> LMMConfig:
    """The config of a family's shape with some fields of its config.json changed; those in nested fields too."""
    fields = copy.deepcopy(FAMILIES[family].tiny(0)[shape].fields)
    for name, values in changes.items():
        fields[name] = {**fields[name], **values} if isinstance(values, dict) and name in fields else values
    return read_fields(fields)


def _randomised(model: torch.nn.Module, own_head: bool) -> torch.nn.Module:
    """Draws random parameters, norms around 1: initial zeros and ones would hide a wrong bias or unit."""
    generator = torch.Generator().manual_seed(0)
    if own_head:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = 1 + 0.3 * noise if scale else 0.2 * noise
    return model.eval()


@lru_cache
def tokenizer() -> Tokenizer:
    """Returns a tokenizer of the special tokens of all families and the words of the tests."""
    words = [*SPECIAL, "text:", "question:", "what", "is", "the", "price", "?", "answer:", ",", "new", "$25."]
    words_tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    words_tokenizer.add_special_tokens(list(SPECIAL))
    words_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words_tokenizer


def batch(config: LMMConfig, *, pad: str = "right", seed: int = 0) -> dict:
    """Returns four rows of unequal lengths with 2, 0, 1 and 2 pictures, the arrays for training, and one unused slot.

    Where pictures are cut to squares, each is of another size.
    """
    rng = np.random.default_rng(seed)
    pictures = [[_picture(rng, config, count) for _ in range(count)] for count in PICTURES]
    rows = [_row(rng, row, 4 + place, config) for place, row in enumerate(pictures)]
    length = max(len(row) for row in rows)
    ids, mask = np.zeros((2, len(rows), length), np.int32)
    for place, row in enumerate(rows):
        at = slice(len(row)) if pad == "right" else slice(length - len(row), None)
        ids[place, at], mask[place, at] = row, 1
    used = [sum(len(place) for place in row) for row in pictures]
    valid, side = np.arange(max(used) + 1) < np.array(used)[:, None], config.side
    pixels = rng.normal(size=(*valid.shape, side, side, 3)).astype(np.float32)
    pixels[~valid] = 0
    images = {"pixels": pixels, "valid": valid} | ({} if config.usual_place is None else _placed(pictures, valid))
    if config.instruction:
        words = rng.integers(5, 20, (*valid.shape, config.instruction))
        lengths = rng.integers(1, config.instruction + 1, (*valid.shape, 1))
        images["instruction"] = np.where(np.arange(config.instruction) < lengths, words, -1).astype(np.int32)
    made = {"images": images, "input_ids": ids, "attention_mask": mask}
    return made | (_apart(rng) if config.encoder_decoder else _answers(ids, mask))


def _picture(rng: np.random.Generator, config: LMMConfig, count: int) -> np.ndarray:
    """Returns the `place` of each slot of one of a row's `count` pictures; without columns if there is no such leaf."""
    if isinstance(config, LlavaOnevisionConfig):
        high, wide = rng.integers(1, 80, 2).tolist()
        return place_of(config, (high, wide), alone=count == 1)
    return places(int(rng.integers(1, 4)), int(rng.integers(1, 4))) if config.grid else np.zeros((1, 0), np.int32)


def _placed(pictures: list[list[np.ndarray]], valid: np.ndarray) -> dict:
    columns = next(place.shape[1] for row in pictures for place in row)
    out = np.zeros((*valid.shape, columns), np.int32)
    for target, row in zip(out, pictures, strict=True):
        at = np.concatenate([np.zeros((0, columns), np.int32), *row])
        target[: len(at)] = at
    return {"place": out}


def image_tokens(config: LMMConfig, place: np.ndarray) -> int:
    """Returns the number of text positions of slots, given their `place`."""
    return family(config).image_tokens(config, {"place": place})


def _row(rng: np.random.Generator, pictures: list[np.ndarray], words: int, config: LMMConfig) -> list[int]:
    row: list[int] = []
    for place in pictures:
        # PyTorch would join adjacent pictures of variable size, so a word separates them.
        before = rng.integers(3) + (config.grid is not None)
        row += [*rng.integers(*WORDS, before), *[config.image_token] * image_tokens(config, place)]
    return [*row, *rng.integers(*WORDS, words)]


def _answers(ids: np.ndarray, mask: np.ndarray) -> dict:
    """The answer of a row is its last two words; in the last row the second is padding."""
    ends = ids.shape[1] - np.argmax(mask[:, ::-1], axis=1)
    at = ends[:, None] + np.array([-2, -1])
    targets = np.take_along_axis(ids, at, axis=1)
    labels = np.full_like(ids, -100)
    np.put_along_axis(labels, at, targets, axis=1)
    targets[-1, -1] = labels[-1, ends[-1] - 1] = -100
    return {"labels": labels, "targets": targets, "positions": (at - 1).astype(np.int32)}


def _apart(rng: np.random.Generator) -> dict:
    """Answers of four tokens for a separate decoder; the last two of the second row are padding."""
    labels = rng.integers(*WORDS, (len(PICTURES), 4)).astype(np.int32)
    decoded = np.pad(labels[:, :-1], ((0, 0), (1, 0)))
    labels[1, -2:] = -100
    places = np.tile(np.arange(4, dtype=np.int32), (len(PICTURES), 1))
    return {"labels": labels, "targets": labels, "positions": places, "decoder_input_ids": decoded}


def counted(arrays: dict) -> np.ndarray:
    """Mask of the logits to compare: tokens without padding; all positions of a model with an encoder."""
    decoded = arrays.get("decoder_input_ids")
    return arrays["attention_mask"] > 0 if decoded is None else np.ones(decoded.shape, bool)


def as_torch(case: Case, arrays: dict, *names: str) -> dict[str, torch.Tensor]:
    """Returns the pictures and the named arrays of a batch in the form of the PyTorch model."""
    ours = {name: arrays[name].astype(np.int64) for name in names if name in arrays}
    pictures = case.reads.torch(arrays, case.model.config)
    return {name: torch.from_numpy(one) for name, one in (ours | pictures).items()}


def torch_logits(model: torch.nn.Module, case: Case, arrays: dict) -> np.ndarray:
    """Returns PyTorch's logits at the positions to compare, [tokens, V]."""
    given = as_torch(case, arrays, "input_ids", "attention_mask", "decoder_input_ids")
    with torch.no_grad():
        return model(**given).logits.float().numpy()[counted(arrays)]


@cache
def _plain(config: LMMConfig):
    return jax.jit(lambda params, batch: functional(config).apply(params, batch)["logits"])


@cache
def _gated(config: LMMConfig):
    return jax.jit(lambda params, batch, gates: functional(config).apply(params, batch, gates)["logits"])


def logits(config: LMMConfig, params: dict, arrays: dict, gates: dict | None = None) -> np.ndarray:
    """Returns our logits at the positions to compare, [tokens, V]; programs are cached by config."""
    made = _plain(config)(params, arrays) if gates is None else _gated(config)(params, arrays, gates)
    return np.asarray(made)[counted(arrays)]


def reloaded(directory: Path) -> torch.nn.Module:
    """Returns the PyTorch model of a directory in float32; no tensor may be missing or unexpected."""
    config = transformers.AutoConfig.from_pretrained(directory)
    kind = getattr(transformers, config.architectures[0])
    model, info = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def close(ours: np.ndarray, reference: np.ndarray) -> None:
    """Asserts a difference of at most 1e-5 times the reference's largest magnitude (at least 1e-5)."""
    np.testing.assert_allclose(ours, reference, rtol=0, atol=max(1e-5, 1e-5 * float(np.abs(reference).max())))
