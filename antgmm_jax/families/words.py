"""Special tokens of a tokenizer that is trained here, and the Hugging Face tokenizer that is made of it."""

from typing import Any

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast, ProcessorMixin

# The ids are part of the interface: configs of models name them.
PAD, EOS, UNK, IMAGE, BOS = range(5)
SPECIAL = ("<pad>", "</s>", "<unk>", "<image>", "<s>")

# Plain text around the image, so that servers which need a chat template accept an exported model.
CHAT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
)


def user_turn(processor: ProcessorMixin, line: str, pictures: int) -> str:
    """A question by the processor's chat template, its pictures first; "" where it has none."""
    if not processor.chat_template:
        return ""
    content: list[Any] = [*[{"type": "image"}] * pictures, {"type": "text", "text": line}]
    turns: list[Any] = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turns, add_generation_prompt=True)


def starts_itself(processor: ProcessorMixin, text: str) -> bool:
    """Whether a text holds the start token that the tokenizer would add before it a second time."""
    start = processor.tokenizer.bos_token
    return bool(start) and text.startswith(start)


def wrap(tokenizer: Tokenizer, *, template: str, **extra) -> PreTrainedTokenizerFast:
    """Makes a Hugging Face tokenizer of it.

    Args:
        tokenizer: the trained one.
        template: what surrounds a text, such as `$A </s>` (T5) or `<s> $A` (Llama).
        extra: further settings of the Hugging Face class.

    Returns:
        A tokenizer that saves and reloads offline.
    """
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
