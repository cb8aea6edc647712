"""The prompt that a server makes of a conversation, compared with that of training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers import ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.words import Messages, starts_itself, templated, user_turn
from antgmm_jax.io.files import read_json
from antgmm_jax.io.loading import load_processor, stock_processor, template_warning
from data.encoding import Encoder
from data.limits import BadRow
from data.record import Record
from experiments.run.files import write_json
from experiments.run.rows.samples import Samples

TEMPLATE, _OLD_TEMPLATE, _PROCESSOR = "chat_template.jinja", "chat_template.json", "processor_config.json"
CHECKED = 32
"""Number of conversations that an export compares."""


class Conversation(NamedTuple):
    """A conversation of the training data.

    Attributes:
        messages: its turns, up to the answer.
        text: the same, rendered as in training.
        images: uint8 [H, W, 3] each.
        ids: its token ids in training, int32 [T].
    """

    messages: Messages
    text: str
    images: Sequence[np.ndarray]
    ids: np.ndarray


def question_about_a_picture(directory: Path, config: LMMConfig) -> dict[str, Any]:
    """Renders a question about a picture as in training, to check that the model can read it.

    Args:
        directory: Hugging Face directory, or a name of the Hub.
        config: its config.

    Returns:
        `template`, whether the processor has a chat template; `text`, the question as rendered; `tokens`, the number of
        its tokens; and `warning`, that of `template_warning`.

    Raises:
        AntgmmError: the directory has no processor, or its chat template holds no picture or no answer.
    """
    processor: Any = load_processor(directory)
    picture = np.zeros((config.side, config.side, 3), np.uint8)
    try:
        encoder = Encoder(processor, config, max_length=1 << 20, template="{question}")
        row = encoder(Record(images=(picture,), question="question", answer="answer"))
    except (AntgmmError, BadRow) as error:
        raise AntgmmError(f"{directory} cannot read a question about a picture: {error}") from error
    text = encoder.inputs.chat(user_turn("question", 1))
    about = {"template": bool(processor.chat_template), "text": text, "tokens": len(row["prompt"])}
    return {**about, "warning": template_warning(processor)}


def conversations(samples: Samples, count: int) -> list[Conversation]:
    """Returns the first conversations of a data set.

    Args:
        samples: encoded records.
        count: maximum number of conversations.

    Returns:
        At most `count` conversations.
    """
    rows = range(min(count, len(samples)))
    encoder, made = samples.encoder, []
    for row in rows:
        record = samples.records[row]
        messages, ids = encoder.messages(record), samples.rows.tokens(row)["prompt"]
        made.append(Conversation(messages, encoder.inputs.chat(messages), record.images, ids))
    return made


def write_template(directory: Path) -> None:
    """Writes the chat template of a checkpoint as in training, where transformers would read another one.

    Servers add no special tokens to a rendered conversation, so that a model would read prompts without a start token
    that only the tokenizer adds: vLLM 0.32 then answered 12 and 42 of 50 questions differently. Training writes a fixed
    day, and takes a template that only the tokenizer holds.

    Args:
        directory: Hugging Face directory; nothing changes without a processor or without a chat template.
    """
    if not (directory / "preprocessor_config.json").exists() and not (directory / "processor_config.json").exists():
        return
    processor: Any = load_processor(directory)
    template = processor.chat_template
    if not isinstance(template, str):
        return
    if _adds_start(processor) and not starts_itself(processor, templated(processor, user_turn("a", 0))):
        template = "{{ bos_token }}" + template
    if template == stock_processor(directory).chat_template:
        return
    # Of several places, transformers reads another one first.
    (directory / _OLD_TEMPLATE).unlink(missing_ok=True)
    if (path := directory / _PROCESSOR).exists() and "chat_template" in (settings := read_json(path)):
        write_json(path, {key: value for key, value in settings.items() if key != "chat_template"})
    (directory / TEMPLATE).write_text(template)


def _adds_start(processor: Any) -> bool:
    """Whether the tokenizer begins each text with its start token."""
    start = processor.tokenizer.bos_token_id
    return start is not None and processor.tokenizer("a")["input_ids"][0] == start


def first_difference(directory: Path, conversations: Sequence[Conversation]) -> str:
    """Compares token ids as served with those of training.

    Without a chat template, servers and readers of the model card give the processor the text of training. There,
    conversations with several images are not compared: some processors then write the tokens of a single one.

    Args:
        directory: exported checkpoint.
        conversations: conversations with their token ids in training.

    Returns:
        Description of the first difference; "" if there is none.
    """
    if not conversations:
        return ""
    chat, processor = bool(load_processor(directory).chat_template), stock_processor(directory)
    for number, (messages, text, images, ids) in enumerate(conversations):
        if not chat and len(images) > 1:
            continue
        served = served_ids(processor, messages, images) if chat else read_ids(processor, text, images)
        if not np.array_equal(served, ids):
            length = min(len(served), len(ids))
            at = next((i for i in range(length) if served[i] != ids[i]), length)
            return (
                f"conversation {number}: a server reads the token ids {served[at : at + 4].tolist()} at position {at},"
                f" training read {ids[at : at + 4].tolist()}: correct the teacher's"
                f" {TEMPLATE if chat else 'tokenizer files'}"
            )
    return ""


def served_ids(processor: ProcessorMixin, messages: Messages, images: Sequence[np.ndarray]) -> np.ndarray:
    """Returns a server's token ids of a conversation, int32 [T]: like vLLM, it adds no special tokens."""
    options: dict[str, Any] = {"add_special_tokens": False, **_pictures(images)}
    out = processor(text=[templated(processor, messages)], **options)
    return np.asarray(out["input_ids"][0], np.int32)


def read_ids(processor: ProcessorMixin, text: str, images: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the token ids of a text that the processor reads as it is, int32 [T]."""
    return np.asarray(processor(text=[text], **_pictures(images))["input_ids"][0], np.int32)


def _pictures(images: Sequence[np.ndarray]) -> dict[str, Any]:
    # Of an array with few rows, the processor would take the rows for colours.
    return {"images": [[Image.fromarray(image) for image in images]]} if images else {}
