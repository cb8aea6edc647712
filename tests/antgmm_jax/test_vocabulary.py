"""Smaller vocabularies against the `tokenizers` library: a text of kept tokens is split as before."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.vocabulary import _renumbered, kept_tokens, smaller_tokenizer
from data.tokenizer import corpus

TEXTS = [*corpus("s", 60)]
OTHER = "Unseen: naïve façade, 你好!"


def trained(model, trainer, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def byte_pairs():
    special = ["<s>", "</s>", "<unk>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    bytewise = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()}
    return trained(models.BPE(), trainer, **bytewise)


def unigrams():
    special = ["<s>", "</s>", "<unk>", "<image>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
    return trained(models.Unigram(), trainer, pre_tokenizer=pre_tokenizers.Metaspace())


TOKENIZERS = {"byte pairs": byte_pairs(), "unigrams": unigrams()}


def content(tokenizer):
    return json.loads(tokenizer.to_str())


def smaller(tokenizer, needed, size):
    raw = content(tokenizer)
    kept = kept_tokens(raw, needed, size)
    return Tokenizer.from_str(json.dumps(smaller_tokenizer(raw, kept))), kept


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4), more=st.integers(0, 60))
@settings(max_examples=25, deadline=None)
def test_texts_with_kept_tokens_are_split_as_before(kind, texts, more):
    tokenizer = TOKENIZERS[kind]
    needed = {token for text in texts for token in tokenizer.encode(text).ids}
    fewest = len(kept_tokens(content(tokenizer), needed, 0))
    small, kept = smaller(tokenizer, needed, fewest + more)
    assert len(kept) == small.get_vocab_size() == min(fewest + more, tokenizer.get_vocab_size())
    for text in texts:
        before, after = tokenizer.encode(text), small.encode(text)
        assert after.tokens == before.tokens
        assert [kept[token] for token in after.ids] == before.ids


def test_other_texts_are_split_into_smaller_pieces_and_come_back():
    tokenizer = TOKENIZERS["byte pairs"]
    small, _ = smaller(tokenizer, tokenizer.encode(TEXTS[0]).ids, 0)
    for text in (TEXTS[1], OTHER):
        assert small.decode(small.encode(text).ids) == text
        assert len(small.encode(text).ids) >= len(tokenizer.encode(text).ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_stay(kind):
    small, _ = smaller(TOKENIZERS[kind], (), 0)
    encoding = small.encode("a<image>a")
    assert (encoding.tokens[0], encoding.tokens[-1]) == ("<s>", "</s>")
    assert [small.token_to_id(name) for name in ("<s>", "</s>", "<unk>", "<image>")] == [0, 1, 2, 3]
    assert small.token_to_id("<image>") in encoding.ids


def test_the_frequent_tokens_are_kept_first():
    raw = content(TOKENIZERS["byte pairs"])
    few = len(kept_tokens(raw, (), 0))
    first = [raw["model"]["vocab"]["".join(merge)] for merge in raw["model"]["merges"][:5]]
    assert set(kept_tokens(raw, (), few + 5)) - set(kept_tokens(raw, (), 0)) == set(first)


def test_merges_of_one_string_are_read_too():
    raw = content(TOKENIZERS["byte pairs"])
    old = {**raw, "model": {**raw["model"], "merges": [" ".join(merge) for merge in raw["model"]["merges"]]}}
    assert kept_tokens(old, (600,), 400) == kept_tokens(raw, (600,), 400)
    kept = kept_tokens(raw, (600,), 400)
    assert smaller_tokenizer(old, kept) == smaller_tokenizer(raw, kept)


def test_rare_characters_go_where_bytes_can_spell_them():
    vocab = {"<s>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "a": 257, "好": 258}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True}
    raw = {"model": model, "added_tokens": [{"id": 0, "content": "<s>"}]}
    assert kept_tokens(raw, (257,), 0) == list(range(258))


def test_pairs_of_names_and_ids_get_the_new_ids():
    raw = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4}, "merges": [["a", "b"]]},
        "added_tokens": [{"id": 3, "content": "<s>"}, {"id": 4, "content": "</s>"}],
        "post_processor": {"type": "BertProcessing", "sep": ["</s>", 4], "cls": ["<s>", 3]},
        "padding": {"pad_id": 4, "pad_token": "</s>"},
    }
    assert smaller_tokenizer(raw, [0, 1, 3, 4]) == {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "<s>": 2, "</s>": 3}, "merges": []},
        "added_tokens": [{"id": 2, "content": "<s>"}, {"id": 3, "content": "</s>"}],
        "post_processor": {"type": "BertProcessing", "sep": ["</s>", 3], "cls": ["<s>", 2]},
        "padding": {"pad_id": 3, "pad_token": "</s>"},
    }


def test_other_kinds_are_refused():
    raw = {"model": {"type": "WordPiece", "vocab": {"a": 0}}, "added_tokens": []}
    with pytest.raises(AntgmmError, match="WordPiece"):
        kept_tokens(raw, (), 0)


def test_a_flat_config_stays_flat():
    """As of Qwen2.5-VL on the Hub: transformers reads the sizes at the top only if there is no text_config."""
    raw = {"vocab_size": 9, "hidden_size": 4, "bos_token_id": 3, "image_token_id": 7}
    full = {**raw, "text_config": {"bos_token_id": 3, "eos_token_id": 5, "hidden_size": 4}}
    new = {3: 0, 5: 1, 7: 2}
    assert _renumbered(raw, full, new) == {**raw, "bos_token_id": 0, "eos_token_id": 1, "image_token_id": 2}
    nested = {"image_token_id": 7, "text_config": {"hidden_size": 4}}
    full = {"image_token_id": 7, "text_config": {"hidden_size": 4, "eos_token_id": 5}}
    assert _renumbered(nested, full, new) == {"image_token_id": 2, "text_config": {"hidden_size": 4, "eos_token_id": 1}}


def test_another_name_of_a_field_gets_the_new_id():
    """As llava's image_token_id, an attribute that transformers reads in place of image_token_index."""
    raw = {"image_token_id": 7, "text_config": {"hidden_size": 4}}
    full = {"image_token_index": 7, "text_config": {"hidden_size": 4}}
    assert _renumbered(raw, full, {7: 2}) == {**raw, "image_token_id": 2, "image_token_index": 2}
