"""Smaller vocabularies: which tokens to keep, and the files of a checkpoint with their new ids.

A byte-pair tokenizer without the merges that a text never uses splits that text as before, because every merge that it
applies ends inside a token of the result. A unigram tokenizer's best split stays the best among fewer. Text with
only kept tokens therefore keeps them; other text is split into smaller pieces.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.companions import copy_companions
from antgmm_jax.io.files import read_json
from antgmm_jax.io.loading import CONFIG, hf_config

_ID = re.compile(r"(.+_)?token_(id|ids|index)")
"""Fields of a config that name tokens."""
_TOKENIZER, _SETTINGS, _ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_NAMING = ("generation_config.json", "processor_config.json")
"""Files beside the config that name tokens."""
_OLD = (
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Other forms of the whole tokenizer."""


def named_tokens(directory: Path, config: LMMConfig) -> set[int]:
    """Returns the ids of the tokens that the files of a checkpoint name, such as the end token.

    Args:
        directory: Hugging Face directory.
        config: its model config.
    """
    files = [read_json(directory / name) for name in _NAMING if (directory / name).exists()]
    tables = [hf_config(directory).to_dict(), *files]
    ids = {token for table in tables for _, _, tokens in _named(table) for token in tokens}
    start = {config.language.start_token} if config.encoder_decoder else set()
    return {token for token in ids | start | {config.image_token} if 0 <= token < config.language.vocab}


def _named(table: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any, list[int]]]:
    """Path, value and ids of the fields that name tokens of the language model: those of a Q-Former are others."""
    for place in ((), ("text_config",)):
        inside = table.get(*place) if place else table
        for key, value in (inside or {}).items():
            if _ID.fullmatch(key) and value is not None:
                yield (*place, key), value, value if isinstance(value, list) else [value]


def kept_tokens(tokenizer: Mapping[str, Any], needed: Iterable[int], size: int) -> list[int]:
    """Chooses the tokens of a smaller vocabulary.

    Args:
        tokenizer: content of a tokenizer.json with byte pairs or unigrams.
        needed: ids of tokens to keep, besides all special tokens and single characters.
        size: number of tokens: filled with the tokens that the tokenizer learnt first, which are frequent ones.

    Returns:
        Ids, ascending: `size`, or more if more are needed.

    Raises:
        AntgmmError: another kind of tokenizer.
    """
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    if model["type"] not in ("BPE", "Unigram"):
        raise AntgmmError(
            f"a {model['type']} tokenizer keeps its vocabulary: only those with byte pairs or unigrams can be cut"
        )
    ids = _ids(model)
    parents: dict[int, set[int]] = {}
    for left, right in _merges(model):
        parents.setdefault(ids[_merged(model, left, right)], set()).update((ids[left], ids[right]))
    kept = set(needed) | {entry["id"] for entry in added}
    # A tokenizer that can write any byte needs no rare characters.
    kept |= {token for name, token in ids.items() if _is_basic(name, any_byte=model.get("byte_fallback", False))}
    for token in list(kept):
        kept |= _closure(token, parents, kept)
    learnt = parents or sorted(ids.values())
    for token in learnt:
        more = (_closure(token, parents, kept) | {token}) - kept
        if len(kept) + len(more) <= size:
            kept |= more
    return sorted(kept)


def _is_basic(name: str, *, any_byte: bool) -> bool:
    return bool(re.fullmatch(r"<0x[0-9A-F]{2}>", name)) or (len(name) == 1 and not any_byte)


def _closure(token: int, parents: Mapping[int, set[int]], kept: set[int]) -> set[int]:
    """The tokens that a token is merged from, and those that they are merged from, without the kept ones' own."""
    result: set[int] = set()
    open_ones = [token]
    while open_ones:
        for parent in parents.get(open_ones.pop(), ()):
            if parent not in result:
                result.add(parent)
                open_ones += [parent] if parent not in kept else []
    return result


def _ids(model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    return dict(vocab) if model["type"] == "BPE" else {name: token for token, (name, _) in enumerate(vocab)}


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model.get("merges", ()):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _merged(model: Mapping[str, Any], left: str, right: str) -> str:
    prefix = model.get("continuing_subword_prefix") or ""
    return left + right.removeprefix(prefix)


def smaller_tokenizer(tokenizer: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Returns a tokenizer with some of its tokens.

    Args:
        tokenizer: content of its tokenizer.json.
        kept: ids of its tokens, from `kept_tokens`; token `kept[n]` gets the id n.

    Returns:
        Content of the new tokenizer.json.
    """
    new, model = _numbered(kept), dict(tokenizer["model"])
    ids = _ids(model)
    left = {name: new[token] for name, token in ids.items() if token in new}
    if model["type"] == "BPE":
        model["merges"] = [
            [a, b] for a, b in _merges(model) if a in left and b in left and _merged(model, a, b) in left
        ]
        model["vocab"] = left
    else:
        model["vocab"] = [model["vocab"][token] for token in kept if token < len(model["vocab"])]
        model["unk_id"] = None if model.get("unk_id") is None else new[model["unk_id"]]
    added = [{**entry, "id": new[entry["id"]]} for entry in tokenizer["added_tokens"]]
    rest = {name: _renamed(tokenizer.get(name), new) for name in ("post_processor", "padding")}
    return {**tokenizer, **rest, "added_tokens": added, "model": model}


def _renamed(part: Any, new: Mapping[int, int]) -> Any:
    """A post-processor or a padding with the new ids: of `ids`, `pad_id`, and pairs such as ["</s>", 2]."""
    if isinstance(part, list):
        pair = len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int)
        return [part[0], new[part[1]]] if pair else [_renamed(each, new) for each in part]
    if not isinstance(part, Mapping):
        return part
    changed = {name: _renamed(value, new) for name, value in part.items()}
    if "ids" in part:
        changed["ids"] = [new[token] for token in part["ids"]]
    if "pad_id" in part:
        changed["pad_id"] = new[part["pad_id"]]
    return changed


def _numbered(kept: Sequence[int]) -> dict[int, int]:
    return {old: number for number, old in enumerate(kept)}


def write_companions(source: Path, tokenizer: Mapping[str, Any], kept: Sequence[int], target: Path) -> None:
    """Writes config, tokenizer, processor and settings of a checkpoint with a smaller vocabulary.

    The size of the vocabulary in config.json is left to `save_hf`, which takes it from the model config.

    Args:
        source: Hugging Face directory.
        tokenizer: content of its tokenizer.json.
        kept: ids of the tokens, from `kept_tokens`.
        target: existing folder to write to.
    """
    new = _numbered(kept)
    copy_companions(source, target)
    for name in _OLD:
        (target / name).unlink(missing_ok=True)
    raw, full = read_json(source / CONFIG), hf_config(source).to_dict()
    tables = {_TOKENIZER: smaller_tokenizer(tokenizer, kept), CONFIG: _renumbered(raw, full, new)}
    for name in _NAMING:
        if (target / name).exists():
            table = read_json(target / name)
            tables[name] = _renumbered(table, table, new)
    if (target / _SETTINGS).exists():
        settings = read_json(target / _SETTINGS)
        if entries := settings.get("added_tokens_decoder"):
            settings["added_tokens_decoder"] = {str(new[int(token)]): entry for token, entry in entries.items()}
        tables[_SETTINGS] = settings
    if (target / _ADDED).exists():
        tables[_ADDED] = {name: new[token] for name, token in read_json(target / _ADDED).items()}
    for name, table in tables.items():
        (target / name).write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _renumbered(raw: Mapping[str, Any], full: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A table with the new ids of all tokens that it names, also where it left them to the defaults in `full`."""
    result = {**raw, **({"text_config": dict(raw["text_config"])} if raw.get("text_config") else {})}
    flat = "text_config" not in raw and "vocab_size" in raw  # a text_config with ids alone would hide the sizes
    # `full` has no other names of its fields, such as image_token_id for image_token_index; transformers prefers these.
    for (*place, key), value, tokens in [*_named(full), *_named(raw)]:
        # A default of transformers may lie outside of the vocabulary.
        if all(token in new for token in tokens):
            inside = result.setdefault(place[0], {}) if place and not (flat and place == ["text_config"]) else result
            inside[key] = [new[token] for token in tokens] if isinstance(value, list) else new[value]
    return result
