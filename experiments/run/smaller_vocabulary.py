"""A checkpoint with only the words of a task: on small models, tokens that no row uses are most of the parameters."""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pruning
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import vocabulary
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.hub import local
from antgmm_jax.io.loading import load_processor
from antgmm_jax.pure import functional
from data.source import Source
from experiments.run.batch_size import rows_that_fit
from experiments.run.export.card import Origin
from experiments.run.export.completion import ends_of
from experiments.run.export.publishing import Questions, publish
from experiments.run.export.served_prompt import CHECKED, conversations
from experiments.run.host.console import say
from experiments.run.rows.prompts import TEMPLATES, noted_prompt, records_prompt
from experiments.run.rows.samples import Samples
from pruning.costs import total_parameters

SPARE, MULTIPLE = 2, 128
"""Tokens by default: this multiple of the needed ones, for words that no row has, rounded up for matrix units."""
_ANSWER, _ROWS = 32, 16
"""Tokens of an answer, and rows, of the export gate."""


def cut_vocabulary(source: Path, records: Source, out: Path, *, size: int = 0) -> dict[str, Any]:
    """Removes tokens that no record uses. Logits of the others stay as they are.

    Args:
        source: Hugging Face directory, or a name of the Hub.
        records: records of the task, of which all tokens are kept.
        out: folder to create.
        size: number of tokens; 0 for `SPARE` times as many as are needed.

    Returns:
        Figures as JSON types: tokens and parameters before and after, tokens that the records use, result of the gate.

    Raises:
        AntgmmError: as in `open_hf` and `kept_tokens`; `size` is too small, nothing can be removed, or the new
            checkpoint reads a record in another way. Nothing is written then.
    """
    if out.exists():
        raise AntgmmError(f"{out} exists: choose another name or remove it")
    recorded, folder = records_prompt(source), local(source)
    # One of these is chosen later for a checkpoint that records none, so it must stay one that records none.
    single = not all(records.words(row).turns for row in range(len(records)))
    prompts = [*TEMPLATES] if single and not recorded else [noted_prompt(source)]
    config, params = open_hf(folder)
    processor = load_processor(folder)
    samples = [Samples(records, processor, config, prompt=prompt) for prompt in prompts]
    used = set().union(*map(used_tokens, samples))
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    kept = _kept(tokenizer, {*used, *vocabulary.named_tokens(folder, config)}, size, config.language.vocab)
    # A tokenizer may have special tokens beyond the vocabulary of its model; they are behind the others again.
    own = [token for token in kept if token < config.language.vocab]
    smaller = with_tokens(config, own)
    with tempfile.TemporaryDirectory() as place:
        like = Path(place)
        vocabulary.write_companions(folder, tokenizer, kept, like)
        cut = load_processor(like)
        afters = [Samples(records, cut, smaller, prompt=prompt) for prompt in prompts]
        for before, after in zip(samples, afters, strict=True):
            _check_same(before, after, kept)
        after = afters[0]
        rows = rows_that_fit(smaller, min(_ROWS, len(after)), **after.lengths, dtype="float32")
        first = next(after.in_order(rows, prompts=True))
        questions = Questions([first], _ANSWER, *ends_of(like, smaller), conversations(after, CHECKED))
        gate = publish(
            smaller,
            pruning.take(params, functional(config).axes, {"vocab": np.array(own)}),
            out,
            like,
            dtype=str(params["language"]["tokens"].dtype),
            prompt=prompts[0],
            recorded=recorded,
            origin=Origin(f"cut to {len(own)} tokens, without training,", str(source)),
            questions=questions,
        )
    assert gate is not None  # there are questions, and one process
    return {
        "tokens": {"before": config.language.vocab, "used": len(used), "after": len(own)},
        "params": {"before": total_parameters(config), "after": total_parameters(smaller)},
        "gate": gate._asdict(),
    }


def used_tokens(samples: Samples) -> set[int]:
    """Returns the ids of all tokens in prompts and answers."""
    used: set[int] = set()
    for row in range(len(samples)):
        tokens = samples.rows.tokens(row)
        used.update(tokens["prompt"].tolist(), tokens["answer"].tolist())
    return used


def _kept(tokenizer: dict[str, Any], needed: set[int], size: int, whole: int) -> list[int]:
    beyond = sum(entry["id"] >= whole for entry in tokenizer["added_tokens"])
    fewest = len(vocabulary.kept_tokens(tokenizer, needed, 0)) - beyond
    if 0 < size < fewest:
        raise AntgmmError(f"--tokens {size}: the rows, single characters and special tokens need {fewest}")
    size = size or -(-SPARE * fewest // MULTIPLE) * MULTIPLE
    kept = vocabulary.kept_tokens(tokenizer, needed, size + beyond)
    if (count := len(kept) - beyond) >= whole:
        raise AntgmmError(f"the model has {whole} tokens, and {count} are to be kept: choose fewer with --tokens")
    say(f"tokens: {fewest} of {whole} are needed, {count} are kept")
    return kept


def with_tokens(config: LMMConfig, kept: Sequence[int]) -> LMMConfig:
    """Returns the config of a model with some of its tokens.

    Args:
        config: config of the whole model.
        kept: ids of the tokens, ascending.
    """
    new = {old: number for number, old in enumerate(kept)}
    start = {"start_token": new[config.language.start_token]} if config.encoder_decoder else {}
    language = dataclasses.replace(config.language, vocab=len(kept), **start)
    return dataclasses.replace(config, language=language, image_token=new[config.image_token])


def _check_same(before: Samples, after: Samples, kept: Sequence[int]) -> None:
    """Checks that every record has the same tokens as before."""
    olds = np.array(kept)
    for row in range(len(before)):
        old, new = before.rows.tokens(row), after.rows.tokens(row)
        if any(not np.array_equal(olds[new[part]], old[part]) for part in ("prompt", "answer")):
            name = before.records.words(row).id or f"record {row + 1}"
            raise AntgmmError(
                f"{name} is split into other tokens by the smaller vocabulary: this tokenizer cannot be cut"
            )
