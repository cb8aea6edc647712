"""Special tokens of a tokenizer that is trained here, and the Hugging Face tokenizer that is made of it."""

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

# The ids are part of the interface: configs of models name them.
PAD, EOS, UNK, IMAGE, BOS = range(5)
SPECIAL = ("<pad>", "</s>", "<unk>", "<image>", "<s>")


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
