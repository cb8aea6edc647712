"""Questions of several clients in batches of equal widths, answered in PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import ProcessorMixin

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import inputs
from antgmm_jax.families.base import Inputs
from antgmm_jax.families.common.words import Messages
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.loading import load_processor
from data.encoding import decode
from experiments.run.export.completion import positions
from experiments.run.export.ends import end_tokens
from experiments.run.export.in_torch import stop_at, torch_answers, torch_model

STEP = 16
"""Prompts are padded to multiples of this many tokens, so that those of similar length share a batch."""


class Question(NamedTuple):
    """A question as the model reads it.

    Attributes:
        ids: token ids int32 [T].
        images: tree of images, leaves [M, ...].
    """

    ids: np.ndarray
    images: Mapping[str, np.ndarray]

    def group(self) -> tuple[Any, ...]:
        """What questions of a batch have in common: width, and shapes of the images."""
        shapes = tuple((name, leaf.shape) for name, leaf in sorted(self.images.items()))
        return -(-len(self.ids) // STEP) * STEP, shapes


class Model(NamedTuple):
    """What answers questions.

    Attributes:
        reads: turns conversations into token ids and images.
        pad: token that fills rows.
        answer: batch with `images`, `input_ids` and `attention_mask` -> token ids of answers, int [B, N].
        most: most rows of a batch.
        longest: most tokens of a prompt.
    """

    reads: Inputs
    pad: int
    answer: Callable[[Mapping[str, Any]], np.ndarray]
    most: int
    longest: int

    @property
    def processor(self) -> ProcessorMixin:
        """Processor of the model."""
        return self.reads.processor

    def question(self, messages: Messages, images: Sequence[np.ndarray]) -> Question:
        """Reads a conversation.

        Args:
            messages: its turns.
            images: uint8 [H, W, 3] each.

        Raises:
            AntgmmError: the chat template refuses it, a text contains a special token, or it is too long.
        """
        words: Any = self.processor.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        for text in (part["text"] for turn in messages for part in turn["content"] if part["type"] == "text"):
            if special := next((token for token in words.all_special_tokens if token in text), ""):
                raise AntgmmError(f"a text contains {special}: remove it, images are parts of their own")
        question = Question(*self.reads(self.reads.chat(messages), images))
        if len(question.ids) > self.longest:
            raise AntgmmError(f"the conversation has {len(question.ids)} tokens, at most {self.longest} are read")
        return question

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """Answers questions in batches of those with equal width and images.

        Args:
            questions: questions of any number and length.

        Returns:
            One answer per question.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, question in enumerate(questions):
            groups.setdefault(question.group(), []).append(place)
        texts: dict[int, str] = {}
        for (width, _), places in groups.items():
            for begin in range(0, len(places), self.most):
                chosen = places[begin : begin + self.most]
                tokens = self.answer(self._batch([questions[place] for place in chosen], width))
                texts |= zip(chosen, decode(self.processor, tokens), strict=True)
        return [texts[place] for place in range(len(questions))]

    def _batch(self, questions: Sequence[Question], width: int) -> dict[str, Any]:
        """Rows padded to a width, on the side where the model was trained with padding."""
        images = {name: np.stack([one.images[name] for one in questions]) for name in questions[0].images}
        images["valid"] = np.ones(images["pixels"].shape[:2], bool)
        ids = np.full((len(questions), width), self.pad, np.int32)
        mask = np.zeros_like(ids)
        for row, question in enumerate(questions):
            length = len(question.ids)
            at = slice(0, length) if self.reads.encoder_decoder else slice(width - length, width)
            ids[row, at], mask[row, at] = question.ids, 1
        return {"images": images, "input_ids": ids, "attention_mask": mask}


def load(directory: Path, *, max_new_tokens: int, most: int) -> Model:
    """Loads an export in stock `transformers`.

    Args:
        directory: Hugging Face directory.
        max_new_tokens: maximum length of answers.
        most: most rows of a batch.

    Raises:
        AntgmmError: the files cannot be loaded.
    """
    config, _ = open_hf(directory)
    (eos, pad), model = end_tokens(directory), torch_model(directory)
    stop_at(model, eos=eos, pad=pad)
    reads = inputs(config, load_processor(directory))
    longest = positions(directory) - max_new_tokens
    return Model(reads, pad, lambda batch: torch_answers(model, batch, max_new_tokens, pad), most, longest)
