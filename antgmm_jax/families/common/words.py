"""Special tokens of tokenizers that we train, and conversations as text by the chat template."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.templates import render

# These ids are part of the interface: model configs contain them.
PAD, EOS, UNK, IMAGE, BOS = range(5)
SPECIAL = ("<pad>", "</s>", "<unk>", "<image>", "<s>")


def chat_template(picture: str) -> str:
    """Returns a plain chat template, so that servers which require one accept an exported model.

    Servers add no start token to a conversation, so the template does. Harnesses such as lmms-eval write a turn as a
    string that begins with `<image>` and a newline for each image, which becomes what the template writes of parts.

    Args:
        picture: what the processor replaces by the tokens of an image.
    """
    plain = f"message['content'] | replace('<image>\\n', '{picture} ') + end"
    return (
        (
            "{{ bos_token }}{% for message in messages %}{% set answers = message['role'] == 'assistant' %}"
            "{% if answers %}answer: {% endif %}{% set end = eos_token if answers else ' ' %}"
            "{% if message['content'] is string %}{{ PLAIN }}{% else %}{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] }}{% endif %}"
            "{{ end if loop.last or not answers }}{% endfor %}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}answer:{% endif %}"
        )
        .replace("PLAIN", plain)
        .replace("PICTURE", picture)
    )


CHAT = chat_template("<image>")
"""The chat template of new processors with the image token `<image>`."""

AnyTokenizer = Tokenizer | PreTrainedTokenizerFast
"""A tokenizer that we trained, or that of a pretrained language model."""

Messages = Sequence[Mapping[str, Any]]
"""A conversation: turns with `role` and `content`, a list of parts as in `user_turn`."""


class LongText(AntgmmError):
    """A text with more tokens than a part of the model reads.

    Args:
        message: the message.
        part: name of the text.
        tokens: number of its tokens.
        limit: most tokens that are read.
    """

    def __init__(self, message: str, *, part: str, tokens: int, limit: int):
        super().__init__(message)
        self.part, self.tokens, self.limit = part, tokens, limit


def user_turn(line: str, pictures: int) -> Messages:
    """Returns a conversation of one user turn: images, then a line of text."""
    content: list[Any] = [*[{"type": "image"}] * pictures, {"type": "text", "text": line}]
    return [{"role": "user", "content": content}]


def rendered(processor: ProcessorMixin, messages: Messages, plain: Callable[[str, int], str]) -> str:
    """Renders a conversation as text for the processor.

    Args:
        processor: processor of the checkpoint.
        messages: the conversation. If it ends with a user turn, the text ends where the answer begins.
        plain: (line, number of images) -> text, for a processor without a chat template.

    Returns:
        The text.

    Raises:
        AntgmmError: the chat template refuses the conversation; or there is none, and the conversation is not a single
            user turn. Its images are placed first, wherever they are, and its texts are joined by line breaks.
    """
    if processor.chat_template:
        return templated(processor, messages)
    if [turn["role"] for turn in messages] != ["user"]:
        raise AntgmmError("the processor has no chat template: a conversation must be a single user turn")
    parts = messages[0]["content"]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return plain("\n".join(texts), sum(part["type"] == "image" for part in parts))


def templated(processor: ProcessorMixin, messages: Messages) -> str:
    """Renders a conversation by the chat template of a processor; see `rendered`."""
    tokens = processor.tokenizer.special_tokens_map
    return render(processor.chat_template, messages, tokens, generate=messages[-1]["role"] == "user")


def starts_itself(processor: ProcessorMixin, text: str) -> bool:
    """Whether a text already begins with the start token that the tokenizer would add."""
    start = processor.tokenizer.bos_token
    return bool(start) and text.startswith(start)


def wrap(tokenizer: AnyTokenizer, *, template: str, **extra) -> PreTrainedTokenizerFast:
    """Converts a trained tokenizer to a Hugging Face one.

    Args:
        tokenizer: trained tokenizer; a Hugging Face one is returned as it is.
        template: special tokens around a text: `$A </s>` for T5, `$A` where the chat template writes the start token.
        extra: further arguments of the Hugging Face class.

    Returns:
        The Hugging Face tokenizer.
    """
    if not isinstance(tokenizer, Tokenizer):
        return tokenizer
    own = Tokenizer.from_str(tokenizer.to_str())
    named = [(token, place) for place, token in enumerate(SPECIAL) if token in template]
    own.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    return PreTrainedTokenizerFast(
        tokenizer_object=own,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **extra,
    )
