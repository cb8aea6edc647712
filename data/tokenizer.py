"""A small tokenizer for models that are trained from scratch."""

from collections.abc import Iterable, Iterator
from string import digits

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from antgmm_jax.families.words import SPECIAL
from data.maad.answers import accompanying, answer
from data.maad.latents import draw
from data.maad.tiers import tier
from data.maad.vocab import QUESTIONS
from data.record import PROMPT, prompt

# Mathematical digits, double-struck and bold, which no text has.
TENS, HUNDREDS = ("".join(chr(zero + digit) for digit in range(10)) for zero in (0x1D7D8, 0x1D7CE))


def corpus(name: str, count: int = 6000, *, seed: int = 0, template: str = PROMPT) -> Iterator[str]:
    """Prompts and answers of MAAD-synth to train a tokenizer on.

    Args:
        name: the tier.
        count: how many training advertisements to read.
        seed: seed of the data set.
        template: of the prompts.

    Yields:
        One prompt or answer at a time.
    """
    preset = tier(name)
    for index in range(count):
        latents = draw(preset, "train", index, seed)
        yield prompt(QUESTIONS[latents.type], accompanying(preset, latents.text), template)
        yield f"answer: {answer(preset, latents)}"


def train_tokenizer(texts: Iterable[str], *, vocab: int = 1024, min_frequency: int = 20) -> Tokenizer:
    """Trains a byte-pair tokenizer in which every digit and punctuation mark is a token of its own.

    Digits carry their place (Nogueira et al., arXiv 2102.13019): 411 is three tokens that say 4 hundred, 1 ten
    and 1, and decode to 411. A small model that has plain digits copies 411 as 141: nothing but positions tells one
    digit from the next.

    No token crosses from a lower-case letter to a capital: the parts of MerZen are tokens wherever they stand, so that
    a name never seen in training is spelt with tokens that were.

    Args:
        texts: what to learn from.
        vocab: greatest number of tokens.
        min_frequency: how often a pair must occur to become a token.

    Returns:
        The tokenizer: `<pad>` 0, `</s>` 1, `<unk>` 2, `<image>` 3, `<s>` 4; all of printable ASCII is spelt exactly.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        # Hundreds first: what stands behind a digit must still be plain.
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
