"""Training of a small tokenizer for models that are trained from scratch."""

from collections.abc import Iterable, Iterator
from string import digits

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from antgmm_jax.families.common.words import SPECIAL
from data.maad.answers import accompanying, answer
from data.maad.latents import draw
from data.maad.tiers import tier
from data.maad.vocab import QUESTIONS
from data.record import PROMPT, prompt

# Mathematical digits (double-struck and bold), which do not occur in texts.
TENS, HUNDREDS = ("".join(chr(zero + digit) for digit in range(10)) for zero in (0x1D7D8, 0x1D7CE))


def corpus(name: str, count: int = 6000, *, seed: int = 0, template: str = PROMPT) -> Iterator[str]:
    """Iterates over prompts and answers of MAAD-synth, to train a tokenizer.

    Args:
        name: name of the tier.
        count: number of training advertisements.
        seed: seed of the data set.
        template: prompt template.

    Yields:
        A prompt or an answer.
    """
    preset = tier(name)
    for index in range(count):
        latents = draw(preset, "train", index, seed)
        yield prompt(QUESTIONS[latents.type], accompanying(preset, latents.text), template)
        yield f"answer: {answer(preset, latents)}"


def train_tokenizer(texts: Iterable[str], *, vocab: int = 1024, min_frequency: int = 20) -> Tokenizer:
    """Trains a byte-pair tokenizer with single tokens for digits and punctuation marks.

    The token of a digit depends on its place (Nogueira et al., arXiv 2102.13019): 411 is three different tokens for 4
    hundreds, 1 ten and 1 one. With plain digits, a small model copies 411 as 141, because only positions distinguish
    the digits.

    No token contains a lower-case letter followed by a capital: MerZen is split into Mer and Zen, so that unseen names
    consist of seen tokens.

    Args:
        texts: training texts.
        vocab: maximum number of tokens.
        min_frequency: minimum frequency of a pair to become a token.

    Returns:
        The tokenizer, with `<pad>` 0, `</s>` 1, `<unk>` 2, `<image>` 3, `<s>` 4. It encodes printable ASCII losslessly.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        # Hundreds first: their pattern needs plain digits to the right.
        [
            normalizers.Replace(Regex(f"{digit}(?=[0-9]{{{behind}}}(?![0-9{HUNDREDS}]))"), symbol)
            for behind, symbols in ((2, HUNDREDS), (1, TENS))
            for digit, symbol in zip(digits, symbols, strict=True)
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(rf"[0-9{TENS}{HUNDREDS}.,:;!?\n]"), "isolated"),
            pre_tokenizers.Split(Regex(r"▁?[A-Z][a-z]+"), "isolated"),
        ]
    )
    plain = zip(TENS + HUNDREDS, digits + digits, strict=True)
    tokenizer.decoder = decoders.Sequence(
        [*(decoders.Replace(symbol, digit) for symbol, digit in plain), decoders.Metaspace(prepend_scheme="always")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL),
        initial_alphabet=[chr(c) for c in range(33, 127)] + ["▁", "\n", *TENS, *HUNDREDS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
