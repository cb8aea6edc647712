"""Special tokens of tokenizers that we train, and prompts by chat template."""

from typing import Any

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast, ProcessorMixin

# These ids are part of the interface: model configs contain them.
PAD, EOS, UNK, IMAGE, BOS = range(5)
SPECIAL = ("<pad>", "</s>", "<unk>", "<image>", "<s>")

# A plain chat template, so that servers which require one accept an exported model.
CHAT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
)


def user_turn(processor: ProcessorMixin, line: str, pictures: int) -> str:
    """Formats a user's turn (images, then the line) by the chat template; "" if the processor has none."""
    if not processor.chat_template:
        return ""
    content: list[Any] = [*[{"type": "image"}] * pictures, {"type": "text", "text": line}]
    turns: list[Any] = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turns, add_generation_prompt=True)


def starts_itself(processor: ProcessorMixin, text: str) -> bool:
    """Whether a text already begins with the start token that the tokenizer would add."""
    start = processor.tokenizer.bos_token
    return bool(start) and text.startswith(start)


def wrap(tokenizer: Tokenizer, *, template: str, **extra) -> PreTrainedTokenizerFast:
    """Converts a trained tokenizer to a Hugging Face one.

    Args:
        tokenizer: trained tokenizer.
        template: special tokens around a text, such as `$A </s>` (T5) or `<s> $A` (Llama).
        extra: further arguments of the Hugging Face class.

    Returns:
        The Hugging Face tokenizer.
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
